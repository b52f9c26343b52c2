"""The loop: it goes on where it stopped, to the same bits, and tells what it does."""

import csv
import functools
import io
import json
import os
import signal
import threading

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from eqx_transformers.training import loop
from eqx_transformers.training.batching import Buckets
from eqx_transformers.training.callbacks import Callback, EarlyStop, to_run
from eqx_transformers.training.checkpoint import Checkpoints
from eqx_transformers.training.data import Batches
from eqx_transformers.training.history import History, Log, plot_curves, smoothed
from eqx_transformers.training.loop import Fitted, Interrupted, NotFinite, fit
from eqx_transformers.training.updater import compiled

from .small_run import WIDTH, Rows, digest, held_out, make


class Told:
    """A callback that keeps all that it is told, and a console that keeps what is printed."""

    def __init__(self, at=None, act=None):
        self.found, self.at, self.act, self.text = [], at, act, io.StringIO()
        self.console = Console(file=self.text, width=100)

    def on_start(self, info):
        self.found.append(("start", info))

    def on_step(self, step, metrics):
        self.found.append(("step", step))

    def on_evaluate(self, step, metrics):
        self.found.append(("evaluate", step))
        if step == self.at:
            self.act()

    def on_end(self, history):
        self.found.append(("end", history))


def plainly(records):
    """Without what depends on time."""
    return [{name: x for name, x in one.items() if name != "tokens_per_second"} for one in records]


UPDATER, STATE = None, None


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """One updater for all runs here, and one program."""
    global UPDATER, STATE
    UPDATER, STATE = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compiled", functools.cache(lambda updater: compiled(updater)))
        yield
    UPDATER = STATE = None


def run(steps, *, rows=None, **options):
    state = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, STATE)
    return fit(UPDATER, state, Rows() if rows is None else rows, steps=steps, **{"progress": False, **options})


@pytest.fixture(scope="module")
def twelve(compiled_once):
    return run(12, evaluate=held_out, evaluate_every=5)


def test_it_is_the_updates_one_after_the_other(twelve):
    updater, state = make()
    update, rows, losses = compiled(updater), iter(Rows()), []
    for _ in range(12):
        state, metrics = update(state, next(rows))
        losses.append(float(metrics["loss"]))
    assert isinstance(twelve, Fitted) and twelve.stopped == "steps"
    assert digest(twelve.state) == digest(state)
    assert [one["step"] for one in twelve.history.steps] == [*range(1, 13)]
    assert [one["loss"] for one in twelve.history.steps] == losses
    assert [one["step"] for one in twelve.history.evaluations] == [5, 10, 12]
    assert twelve.history.evaluations[-1] == {"step": 12, **held_out(state.model)}


def test_stopped_anywhere_it_goes_on_to_the_same_bits_history_and_log(tmp_path, twelve):
    options = {"evaluate": held_out, "evaluate_every": 5, "log": tmp_path / "log.jsonl"}
    for steps in (4, 5, 9, 12, 12):
        told = Told()
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            fitted = run(
                steps, checkpoints=checkpoints, checkpoint_every=3, callbacks=[told], progress=told.console, **options
            )
        at = 0 if steps == 4 else told.found[0][1]["step"]
        assert ("Going on from step" in told.text.getvalue()) == (at > 0)
    # The evaluations at the ends of the parts are more than those of one run.
    assert [one["step"] for one in fitted.history.evaluations] == [4, 5, 9, 10, 12]
    assert digest(fitted.state) == digest(twelve.state)
    assert plainly(fitted.history.steps) == plainly(twelve.history.steps)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert plainly(line for line in lines if "loss" in line) == plainly(twelve.history.steps)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [4, 5, 9, 10, 12]
    # Steps 11 and 12 are lost: trained again, from the data that they had.
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert 12 in checkpoints.steps and 10 in checkpoints.steps
        assert not (damage := tmp_path / "checkpoints/12/meta/metadata").write_bytes(b"")
        assert damage.exists()
        with pytest.warns(UserWarning, match="passed over"):
            again = run(12, checkpoints=checkpoints, **options)
    assert digest(again.state) == digest(twelve.state)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert plainly(line for line in lines if "loss" in line) == plainly(twelve.history.steps)


def test_real_batches_go_on_where_they_were_too(tmp_path):
    texts = [[i + 1] * (1 + i % 5) for i in range(37)]
    batches = Batches(texts, Buckets(batch_size=4), padding_id=0, seed=3)
    seen = []

    def numbers(batch):  # of the length of the rows: a program for each
        seen.append(batch["token_ids"])
        x = np.resize(batch["token_ids"], (4, WIDTH)).astype(np.float32) / 40
        return {"x": x, "y": batch["weights"]}

    whole = run(25, rows=batches, place=numbers)
    once, seen = seen, []
    for steps in (11, 25):
        with Checkpoints(tmp_path) as checkpoints:
            parts = run(steps, rows=batches, place=numbers, checkpoints=checkpoints)
    assert digest(parts.state) == digest(whole.state)
    assert len(once) == len(seen) == 25 > batches.per_epoch
    assert all(np.array_equal(a, b) for a, b in zip(once, seen, strict=True))


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path):
    scores = iter([0.5, 0.2, 0.4, 0.9, 0.3])
    with Checkpoints(tmp_path, keep=1, best="score", mode="max") as checkpoints:
        fitted = run(10, evaluate=lambda model: {"score": next(scores)}, evaluate_every=2, checkpoints=checkpoints)
        assert (checkpoints.best_step, checkpoints.steps) == (8, [8, 10])
        assert fitted.history.best("score", "max") == {"step": 8, "score": 0.9}
        best = checkpoints.restore(fitted.state, best=True)
    assert best is not None and digest(best.state) == digest(run(8).state) and best.metrics == {"score": 0.9}
    with Checkpoints(tmp_path / "other") as checkpoints, pytest.raises(ValueError, match="do not say 'loss'; evaluate"):
        run(2, evaluate=lambda model: {"score": 1.0}, checkpoints=checkpoints)


def test_an_early_stop_stops_and_stays_stopped(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 1.95, 1.0, 0.0])
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            fitted = run(
                20,
                evaluate=lambda model: {"loss": next(losses)},
                evaluate_every=2,
                stop=EarlyStop(patience=2, least=0.1),
                checkpoints=checkpoints,
            )
        assert fitted.stopped == "early" and int(fitted.state.step) == 8
    assert next(losses) == 1.0


@pytest.mark.parametrize(
    ("values", "settings", "stops"),
    [
        ([1, 2, 3], {"patience": 2}, True),
        ([1, 2], {"patience": 2}, False),
        ([1, 2, 3], {"patience": 2, "mode": "max"}, False),
        ([3, 3, 3], {"patience": 2, "mode": "max"}, True),
        ([float("nan")] * 2, {"patience": 2}, True),
        ([float("nan"), 1.0], {"patience": 1}, False),
        ([], {"patience": 1}, False),
    ],
)
def test_patience(values, settings, stops):
    assert EarlyStop(**settings)(History([], [{"step": i, "loss": float(x)} for i, x in enumerate(values)])) == stops


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_which_is_saved(tmp_path, twelve, number, capsys):
    rows = Signals(6, number)
    told, before = Told(), signal.getsignal(number)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            Interrupted, match=f"{number.name}: saved at step 6 of 12 in {tmp_path}. Run the same"
        ) as error:
            run(12, rows=rows, checkpoints=checkpoints, callbacks=[told], progress=told.console)
        assert isinstance(error.value, KeyboardInterrupt) and error.value.signal == number
        assert signal.getsignal(number) is before and checkpoints.steps == [6]
        assert str(error.value) in capsys.readouterr().err and told.found[-1] == ("step", 6)
        assert digest(run(12, checkpoints=checkpoints).state) == digest(twelve.state)


class Signals(Rows):
    """Rows whose batch `at` is given while signals come."""

    def __init__(self, when, *numbers):
        super().__init__()
        self.when, self.numbers = when, numbers

    def __iter__(self):
        return Signals(self.when, *self.numbers)

    def __next__(self):
        batch = super().__next__()
        if self.at == self.when:
            for number in self.numbers:
                signal.raise_signal(number)
        return batch


def test_a_second_signal_stops_at_once_and_one_without_checkpoints_says_that_nothing_is_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(KeyboardInterrupt, match="a second time") as error:
            run(12, rows=Signals(6, signal.SIGINT, signal.SIGTERM), checkpoints=checkpoints)
        assert not isinstance(error.value, Interrupted) and checkpoints.steps == []
    with pytest.raises(Interrupted, match="Nothing is saved: there are no checkpoints"):
        run(12, rows=Signals(6, signal.SIGINT))


def test_a_signal_during_an_evaluation_ends_it_after_that_one(tmp_path):
    interrupt = lambda model: signal.raise_signal(signal.SIGINT) or held_out(model)
    with Checkpoints(tmp_path) as checkpoints:
        for every, step in ((3, 3), (None, 12)):
            with pytest.raises(Interrupted, match=f"saved at step {step} of 12"):
                run(12, evaluate=interrupt, evaluate_every=every, checkpoints=checkpoints)
            assert checkpoints.best_step is not None and max(checkpoints.steps) == step


def test_a_signal_before_an_evaluation_ends_it_with_what_that_says(tmp_path, twelve):
    given = {"evaluate": held_out, "evaluate_every": 3}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        with pytest.raises(Interrupted, match="saved at step 6 of 12"):
            run(12, rows=Signals(6, signal.SIGINT), checkpoints=checkpoints, **given)
        run(12, checkpoints=checkpoints, **given)
        assert checkpoints.steps == [3, 6, 9, 12] and sorted(checkpoints._scores) == [3, 6, 9, 12]


def test_in_another_thread_it_runs_without_signals(twelve):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(12)))
    thread.start()
    thread.join()
    assert digest(found[0].state) == digest(twelve.state)


def test_steps_that_are_not_finite_are_counted_and_many_in_a_row_are_an_error(tmp_path):
    told = Told()
    with Checkpoints(tmp_path) as checkpoints:
        for steps in (5, 9):
            options = {"progress": told.console, "most_skipped": 3, "log_every": 4, "checkpoints": checkpoints}
            fitted = run(steps, rows=Rows(bad={2, 3, 7}), **options)
    assert fitted.history.skipped == 3 == int(fitted.state.skipped)
    assert "9 steps done, 3 steps skipped that were not finite." in told.text.getvalue()
    with pytest.raises(NotFinite, match=r"3 steps in a row were not finite, the last of them step 6: .*loss nan"):
        run(40, rows=Rows(bad={4, 5, 6, 7, 8, 9}), most_skipped=3)


def test_metrics_are_read_when_two_further_steps_are_under_way():
    class Reader:
        found = []

        def on_step(self, step, metrics):
            self.found.append((step, rows.at))

    rows = Closing(at=0)
    run(5, rows=rows, callbacks=[Reader()])
    assert Reader.found == [(1, 3), (2, 4), (3, 5), (4, 5), (5, 5)]


class Closing(Rows):
    """Rows that note when they are closed, and, where they say where they are, are their own iterator."""

    def __init__(self, at=None, closed=None):
        super().__init__()
        self.is_mine, self.closed = at is not None, [] if closed is None else closed

    def __iter__(self):
        return self if self.is_mine else Closing(closed=self.closed)

    def close(self):
        self.closed.append(self.at)


def test_data_that_ends_and_data_that_is_a_list():
    told = Told()
    fitted = run(20, rows=Rows(batches=4), evaluate=held_out, progress=told.console)
    assert fitted.stopped == "data" and int(fitted.state.step) == 4
    assert [one["step"] for one in fitted.history.evaluations] == [4]
    assert "4 steps done, for there is no more data." in told.text.getvalue()
    assert digest(run(20, rows=[next(Rows(batches=1))] * 4, place=jax.device_put).state) != digest(fitted.state)


def test_iterators_that_it_made_are_closed_and_others_are_not():
    its, mine = Closing(), Closing(at=0)
    run(3, rows=its)
    run(3, rows=mine)
    assert (its.closed, mine.closed, mine.at) == ([3], [], 3)


def test_callbacks_are_told_in_order_and_runs_logged_to():
    told, logged = Told(), []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

    options = {"schedule": optax.linear_schedule(1.0, 0.0, 4), "log_every": 2}
    fitted = run(4, evaluate=held_out, evaluate_every=3, callbacks=[told, to_run(Run())], **options)
    steps = [("step", 2), ("step", 3), ("evaluate", 3), ("step", 4), ("evaluate", 4)]  # each evaluated one is recorded
    assert told.found == [("start", {"step": 0, "steps": 4}), *steps, ("end", fitted.history)]
    assert [step for step, _ in logged] == [2, 3, 3, 4, 4]
    assert logged[0][1]["train/loss"] == fitted.history.steps[0]["loss"]
    assert logged[2][1] == {"held_out/loss": fitted.history.evaluations[0]["loss"]}
    assert [one["learning_rate"] for one in fitted.history.steps] == [0.75, 0.5, 0.25]
    assert {name for name in vars(Callback) if name.startswith("on_")} == {f"on_{name}" for name in EVENTS}


EVENTS = ("start", "step", "evaluate", "end")


def test_what_is_shown_in_lines_in_a_terminal_and_not_at_all(capsys):
    lines, bar = Told(), io.StringIO()
    run(6, evaluate=held_out, evaluate_every=3, progress=lines.console)
    said = lines.text.getvalue().splitlines()
    assert said[0].startswith("step 1/6  loss ") and said[1].startswith("step 3/6  held out: loss ")
    assert said[-1] == "6 steps done."
    run(6, progress=Console(file=bar, force_terminal=True, width=100))
    assert "6 steps done." in bar.getvalue() and "\x1b[" in bar.getvalue() and "0/6" in bar.getvalue()
    run(6, progress=False)
    assert capsys.readouterr().out == ""


def test_a_log_as_csv_has_all_columns_and_is_cut_where_it_is_gone_on_from(tmp_path):
    log = tmp_path / "deep/log.csv"
    run(5, evaluate=held_out, evaluate_every=4, log=log)
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "4", "5", "5"]
    assert [row["step"] for row in rows if row["held_out_loss"]] == ["4", "5"]
    assert all(float(row["loss"]) > 0 for row in rows if row["loss"]) and rows[0]["finite"] == "1"
    with open(log, "a") as file:
        file.write("6,1,0.")  # killed in the middle of a line
    Log(log, 4).write({"step": 5, "new": 1.5})
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "4", "5"] and rows[-1]["new"] == "1.5"
    Log(log, 0).write({"step": 1})
    assert log.read_text() == "step\n1\n" and len((tmp_path / "deep/log.csv.old").read_text().splitlines()) == 7
    assert sorted(os.listdir(log.parent)) == ["log.csv", "log.csv.old"]


@pytest.mark.parametrize(("name", "text"), [("a.csv", "label,text\n1,2\n"), ("a.jsonl", "[1]\n"), ("a.jsonl", "x\n")])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="is not a log of training"):
        Log(tmp_path / name, 3)
    assert (tmp_path / name).read_text() == text


def test_curves_are_drawn(tmp_path, twelve):
    steps = [one | {"learning_rate": 0.1} for one in twelve.history.steps]
    evaluations = [one | {"accuracy_$x": 0.5} for one in twelve.history.evaluations]
    path = plot_curves(History(steps, evaluations), tmp_path / "deep/curves.svg", title="a run")
    said = path.read_text()
    assert said.count('<g id="axes_') == 3 and "</svg>" in said and "<!-- training -->" in said
    long = [{"step": i, "loss": float(i % 3)} for i in range(60)]
    assert "<!-- training, smoothed -->" in plot_curves(History(long), tmp_path / "long.svg").read_text()
    run(2, plot=tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert plot_curves(History(), tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match=r"written as \.png or \.svg"):
        plot_curves(History(), "curves.pdf")
    assert np.allclose(smoothed(np.array([np.nan, 2.0, np.inf, 4.0])), [np.nan, 2, 2, 4], equal_nan=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps = 0 must be at least 1"),
        ({"evaluate_every": 2}, ValueError, "evaluate_every needs evaluate="),
        ({"checkpoint_every": 2}, ValueError, "checkpoint_every needs checkpoints="),
        ({"stop": EarlyStop()}, ValueError, "stop= is asked after evaluations"),
        ({"log": "log.txt"}, ValueError, r"written as \.csv or \.jsonl"),
        ({"plot": "curves.pdf"}, ValueError, r"written as \.png or \.svg"),
        ({"callbacks": [3]}, TypeError, "a int has none"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_the_first_step(options, error, message, unchecked):
    told = Told()
    with pytest.raises(error, match=message):
        run(**{"steps": 2, "callbacks": [told], **options})
    assert told.found == []


def test_other_things_that_cannot_be_meant(tmp_path, unchecked):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="a list has no get_state"):
        run(2, rows=[1], checkpoints=checkpoints)
    with pytest.raises(TypeError, match="a int has none"):
        to_run(3)
    with pytest.raises(ValueError, match="patience at least 1"):
        EarlyStop(patience=0)
