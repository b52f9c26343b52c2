"""The examples of docs/generation.md and docs/t5.md run as they stand."""

from ..examples import run_examples


def test_the_examples_of_generation_run_in_order(capsys):
    count, names = run_examples("docs/generation.md")
    assert count == 2
    assert names["best"].shape == names["sampled"].shape == (2, 8)
    assert names["found"].tokens.shape == (2, 3, 8)
    assert len(capsys.readouterr().out.splitlines()) >= 8


def test_the_examples_of_t5_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count, names = run_examples("docs/t5.md")
    assert count == 2
    assert names["logits"].shape == (2, 3, 32128) and names["tokens"].shape == (2, 8)
    assert names["codes"].shape == (2, 1, 16) and names["between"].shape == (5, 1, 16)
    assert float(names["value"]) > 0 and names["drawn"].shape == (3, 6)
    assert capsys.readouterr().out.count("\n") == 6 and (tmp_path / "plane.png").stat().st_size > 10_000
