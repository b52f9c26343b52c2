"""Ways through latents against loops in float64; their plane against its definition; pictures as files and as drawn."""

import builtins
import math
import os
import xml.etree.ElementTree as xml
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from eqx_transformers import pictures
from eqx_transformers.latents import analogy, interpolate, picture, principal_plane, sample_prior, table

pytestmark = pytest.mark.usefixtures("strict_promotion")
KEY = jax.random.key(0)
SHAPE = (3, 5)
rng = np.random.default_rng(0)
f32 = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
A, B, C = f32(*SHAPE), f32(*SHAPE), f32(*SHAPE)
KINDS = ["linear", "spherical"]


# ---- from one to another


def looped(a, b, steps, kind):
    a, b = np.float64(a).ravel(), np.float64(b).ravel()
    angle = math.acos((a @ b) / math.sqrt((a @ a) * (b @ b)))
    out = []
    for i in range(steps):
        r = i / (steps - 1)
        if kind == "linear":
            out.append([p + r * (q - p) for p, q in zip(a, b, strict=True)])
        else:
            of_a, of_b = math.sin((1 - r) * angle) / math.sin(angle), math.sin(r * angle) / math.sin(angle)
            out.append([of_a * p + of_b * q for p, q in zip(a, b, strict=True)])
    return np.array(out)


@pytest.mark.parametrize("shape", [SHAPE, (15,), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("steps", [2, 3, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_way_is_that_of_a_loop_over_flat_vectors(kind, steps, shape):
    found = interpolate(A.reshape(shape), B.reshape(shape), steps, kind=kind)
    assert found.shape == (steps, *shape) and found.dtype == jnp.float32
    np.testing.assert_allclose(found.reshape(steps, -1), looped(A, B, steps, kind), rtol=1e-5, atol=1e-6)
    assert steps == 2 or np.abs(looped(A, B, steps, "linear") - looped(A, B, steps, "spherical")).max() > 1e-2


HARD = {
    "any": (A, B),
    "equal": (A, A),
    "parallel": (A, 2.5 * A),
    "opposite": (A, -A),
    "opposite, longer": (A, -3 * A),
    "nearly opposite": (A, -A + 1e-4 * B),
    "zero": (jnp.zeros(SHAPE), B),
    "both zero": (jnp.zeros(SHAPE), -jnp.zeros(SHAPE)),
    "tiny": (1e-30 * A, 1e-30 * B),
    "huge": (1e30 * A, 1e30 * B),
    "one number": (jnp.asarray([0.3]), jnp.asarray([-2.0])),
    "a number": (jnp.asarray(0.3), jnp.asarray(-2.0)),
}
LINES = ["equal", "parallel", "opposite", "opposite, longer", "nearly opposite", "zero", "both zero", "one number"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", HARD)
def test_ends_are_bit_for_bit_and_nothing_is_lost_on_the_way(case, kind):
    a, b = HARD[case]
    found = np.asarray(interpolate(a, b, 4, kind=kind))
    assert found[0].tobytes() == np.asarray(a).tobytes() and found[-1].tobytes() == np.asarray(b).tobytes()
    assert np.isfinite(found).all()
    backwards = interpolate(b, a, 4, kind=kind)
    scale = max(np.abs(a).max(), np.abs(b).max())
    np.testing.assert_allclose(backwards[::-1], found, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("case", LINES)
def test_where_no_great_circle_is_singled_out_it_is_the_line(case):
    a, b = HARD[case]
    scale = max(np.abs(a).max(), np.abs(b).max())
    line, found = (interpolate(a, b, 7, kind=kind) for kind in ("linear", "spherical"))
    np.testing.assert_allclose(found, line, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("case", ["tiny", "huge"])
def test_the_great_circle_does_not_depend_on_the_scale(case):
    scale = {"tiny": 1e-30, "huge": 1e30}[case]
    found = interpolate(*HARD[case], 5, kind="spherical")
    np.testing.assert_allclose(found / scale, interpolate(A, B, 5, kind="spherical"), rtol=1e-4, atol=1e-5)


def at_angle(angle):
    """Two vectors of length 2 with this angle between them."""
    first, second = np.linalg.qr(np.float64(rng.normal(size=(15, 2))))[0].T
    turn = lambda t: jnp.asarray(2 * (math.cos(t) * first + math.sin(t) * second), jnp.float32)
    return turn(0.0), turn(angle)


@pytest.mark.parametrize("angle", [1e-3, 0.3, math.pi / 2, 2.0, 3.0, math.pi - 0.021])
def test_the_great_circle_keeps_the_length_and_goes_at_one_speed(angle):
    way = np.float64(interpolate(*at_angle(angle), 9, kind="spherical"))
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), 2, rtol=2e-4)
    steps = np.linalg.norm(np.diff(way, axis=0), axis=1)
    np.testing.assert_allclose(steps, 4 * math.sin(angle / 16), rtol=2e-3)


def test_from_the_great_circle_to_the_line_it_goes_without_a_jump():
    # From one angle to the next, the middle moves little, down from the circle (length 2) to the line (0.01 and less).
    first, second = np.linalg.qr(np.float64(rng.normal(size=(15, 2))))[0].T
    middles = []
    for short in np.linspace(0.022, 0.0, 89):
        end = 2 * (math.cos(math.pi - short) * first + math.sin(math.pi - short) * second)
        middles.append(interpolate(jnp.float32(2 * first), jnp.float32(end), 3, kind="spherical")[1])
    lengths = np.linalg.norm(middles, axis=1)
    assert lengths[0] > 1.99 and lengths[-1] < 1e-6 and (np.diff(lengths) < 1e-3).all()
    assert np.linalg.norm(np.diff(middles, axis=0), axis=1).max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case in HARD if case not in ("tiny", "huge")])
def test_gradients_are_finite_and_at_the_ends_those_of_the_ends(case, kind):
    a, b = HARD[case]
    slopes = jax.jacobian(lambda *x: interpolate(*x, 4, kind=kind).reshape(4, -1).sum(1), (0, 1))(a, b)
    assert all(np.isfinite(s).all() for s in slopes)
    np.testing.assert_array_equal(slopes[0][0], np.ones_like(a))
    np.testing.assert_array_equal(slopes[1][0], np.zeros_like(b))


@pytest.mark.parametrize("kind", KINDS)
def test_ways_go_through_jit_and_vmap_and_other_dtypes(kind):
    way = lambda a, b: interpolate(a, b, 5, kind=kind)
    pairs = jnp.stack([A, B]), jnp.stack([C, A])
    found = jax.jit(jax.vmap(way))(*pairs)
    for i in range(2):
        np.testing.assert_allclose(found[i], way(pairs[0][i], pairs[1][i]), rtol=1e-5, atol=1e-6)
    half = way(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and way(A.astype(jnp.bfloat16), B).dtype == jnp.float32
    np.testing.assert_allclose(half.astype(jnp.float32), way(A, B), atol=0.03)


# ---- analogies and draws


def test_an_analogy_is_its_formula_and_of_equal_ones_the_third():
    np.testing.assert_array_equal(analogy(A, B, C), np.asarray(C) + (np.asarray(B) - np.asarray(A)))
    np.testing.assert_array_equal(analogy(A, A, C), C)
    np.testing.assert_array_equal(analogy(A, B, jnp.zeros(SHAPE)), B - A)
    half = analogy(A, B, C.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), analogy(A, B, C), atol=0.03)


def test_draws_of_the_prior_are_standard_normal():
    draws = sample_prior((20_000, *SHAPE), key=KEY)
    assert draws.shape == (20_000, *SHAPE) and draws.dtype == jnp.float32
    np.testing.assert_allclose(draws.mean(0), np.zeros(SHAPE), atol=0.04)
    covariance = np.cov(np.asarray(draws).reshape(-1, 15).T)
    np.testing.assert_allclose(covariance, np.eye(15), atol=0.05)
    assert (sample_prior((2,), key=KEY) != sample_prior((2,), key=jax.random.key(1))).all()


# ---- the plane

STRETCH = jnp.asarray([0.3, 5.0, 0.1, 0.2, 2.0, *[0.1] * 10])
CLOUD = 1 + (f32(60, 15) * STRETCH[None]).reshape(60, *SHAPE)


def test_the_plane_is_that_of_the_largest_eigenvalues_of_the_covariance():
    plane = principal_plane(CLOUD)
    flat = np.float64(CLOUD).reshape(60, 15)
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    np.testing.assert_allclose(plane.mean, flat.mean(0).reshape(SHAPE), rtol=1e-5)
    np.testing.assert_allclose(plane.explained, values[[-1, -2]] / values.sum(), rtol=1e-5)
    directions = np.float64(plane.directions).reshape(2, 15)
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=5e-6)
    np.testing.assert_allclose(np.abs(directions @ vectors[:, [-1, -2]]), np.eye(2), atol=1e-5)
    expected = [
        [sum(d * (x - m) for d, x, m in zip(w, z, flat.mean(0), strict=True)) for w in directions] for z in flat
    ]
    np.testing.assert_allclose(plane(CLOUD), expected, rtol=1e-4, atol=1e-5)


def test_a_point_a_batch_and_a_batch_of_batches_are_placed_alike():
    plane = principal_plane(CLOUD)
    found = plane(CLOUD.reshape(3, 20, *SHAPE))
    assert found.shape == (3, 20, 2) and plane(CLOUD[0]).shape == (2,)
    np.testing.assert_allclose(found.reshape(60, 2), plane(CLOUD), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plane(CLOUD[7]), plane(CLOUD)[7], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plane(plane.mean + 3 * plane.directions[1]), [0, 3], atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda z: principal_plane(z)(z))(CLOUD), plane(CLOUD), rtol=1e-4, atol=1e-4)


def test_its_signs_do_not_depend_on_the_order_or_the_side_of_the_latents():
    plane = principal_plane(CLOUD)
    for other in (CLOUD[::-1], 2 - CLOUD, CLOUD[rng.permutation(60)]):
        np.testing.assert_allclose(principal_plane(other).directions, plane.directions, atol=1e-4)
    for direction in np.asarray(plane.directions):
        assert direction.ravel()[np.abs(direction).argmax()] > 0


def test_latents_on_a_line_and_equal_ones_have_a_plane_without_nan():
    line = principal_plane(jnp.arange(5.0)[:, None, None] * A[None])
    np.testing.assert_allclose(line.explained, [1, 0], atol=1e-5)
    equal = principal_plane(jnp.stack([A] * 4))
    assert ((equal.explained >= 0) & (equal.explained <= 1)).all()
    for plane in (line, equal):
        directions = np.asarray(plane.directions).reshape(2, 15)
        np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-5)
    none = principal_plane(jnp.zeros((4, *SHAPE)))
    assert not none.explained.any() and not none(jnp.zeros(SHAPE)).any()
    assert principal_plane(CLOUD.astype(jnp.bfloat16)).directions.dtype == jnp.float32


# ---- texts


def test_a_table_is_aligned_and_holds_one_text_a_line():
    assert table(["x = 1;", "x = a\n + 1;\t", "é"], [0, 0.5, 1]) == (
        "ratio  text\n 0.00  x = 1;\n 0.50  x = a\\n + 1;\\t\n 1.00  é"
    )
    assert table(["a", ""], jnp.asarray([-10.0, 0.25])) == " ratio  text\n-10.00  a\n  0.25"
    assert table([], []) == "ratio  text"


def test_ratios_have_as_many_decimals_as_tell_them_apart():
    first = lambda ratios: [line.split()[0] for line in table(["t"] * len(ratios), ratios).splitlines()[1:]]
    assert first(np.linspace(0, 1, 3)) == ["0.00", "0.50", "1.00"]
    assert first([0, 0.001, 0.002]) == ["0.000", "0.001", "0.002"]
    assert first([0.5, 0.5]) == ["0.50", "0.50"] and first([0, 1e-9]) == ["0.000000", "0.000000"]


# ---- pictures

POINTS = np.asarray(rng.normal(size=(12, 2)), np.float32)
CLASSES = ["_one", "two", "three $x"] * 4


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, as matplotlib has them."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: figures.append(self) or save(self, *args, **options)
    )
    return figures


def test_a_png_and_an_svg_are_what_they_are_called(tmp_path):
    png = picture(POINTS, path=tmp_path / "new" / "plane.png")
    assert png == tmp_path / "new" / "plane.png" and png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = picture(jnp.asarray(POINTS), path=os.fspath(tmp_path / "plane.SVG"))
    assert xml.parse(svg).getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["plane.SVG", "plane.png"]


def test_classes_have_a_legend_and_each_a_colour_and_a_marker_of_its_own(tmp_path, drawn):
    picture(POINTS, CLASSES, path=tmp_path / "a.png", title="Kinds", meaning="kind")
    plane, (legend,) = drawn[0].axes[0], drawn[0].legends
    assert [t.get_text() for t in legend.get_texts()] == ["_one", "three $x", "two"]
    assert legend.get_title().get_text() == "kind" and plane.get_title() == "Kinds"
    groups = plane.collections
    assert len({tuple(g.get_facecolor()[0]) for g in groups}) == len(groups) == 3
    for group, name in zip(groups, ["_one", "three $x", "two"], strict=True):
        wanted = POINTS[[c == name for c in CLASSES]]
        np.testing.assert_allclose(group.get_offsets(), wanted)
    assert len({g.get_paths()[0].vertices.tobytes() for g in groups}) == 3


@pytest.mark.parametrize(
    "colours", [np.arange(12) % 2, np.arange(12) > 5, [None, "a"] * 6], ids=["ints", "bools", "None"]
)
def test_what_is_no_float_is_a_class(tmp_path, drawn, colours):
    picture(POINTS, colours, path=tmp_path / "a.svg")
    assert len(drawn[0].legends) == 1 and len(drawn[0].axes[0].collections) == 2 and len(drawn[0].axes) == 1


def test_up_to_42_classes_no_two_look_alike(tmp_path, drawn):
    picture(rng.normal(size=(42, 2)), np.arange(42), path=tmp_path / "a.svg")
    look = lambda g: (g.get_paths()[0].vertices.tobytes(), g.get_facecolor().tobytes())
    assert len({look(g) for g in drawn[0].axes[0].collections}) == 42
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == [str(i) for i in range(42)]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_floats_are_numbers_with_a_bar(tmp_path, drawn, dtype):
    numbers = jnp.arange(12).astype(dtype)
    picture(POINTS, numbers, path=tmp_path / "a.png", meaning="length")
    plane, bar = drawn[0].axes
    assert bar.get_ylabel() == "length" and not drawn[0].legends
    np.testing.assert_array_equal(plane.collections[0].get_array(), np.arange(12))


def test_without_colours_there_is_neither_legend_nor_bar_and_both_directions_have_one_scale(tmp_path, drawn):
    picture(POINTS, path=tmp_path / "a.png", axes=("one", "two"))
    (plane,) = drawn[0].axes
    assert not drawn[0].legends and (plane.get_xlabel(), plane.get_ylabel()) == ("one", "two")
    corners = plane.transData.transform([[0, 0], [1, 1]])
    assert np.ptp(corners[:, 0]) == pytest.approx(np.ptp(corners[:, 1]), rel=1e-2)
    assert picture(POINTS[:0], path=tmp_path / "none.png").exists()


def test_labels_stand_at_their_points_and_not_on_each_other(tmp_path, drawn):
    points = np.array([[0, 0], [0.05, 0.01], [0.1, -0.01], [2, 1], [-2, -1]])
    labels = ["a label of $5", "another of $6", "a third_one", None, None]
    picture(points, path=tmp_path / "a.png", labels=labels)
    texts = drawn[0].axes[0].texts
    assert [t.get_text() for t in texts] == labels[:3] and not any(t.get_parse_math() for t in texts)
    np.testing.assert_allclose([t.xy for t in texts], points[:3])
    boxes = [t.get_window_extent() for t in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plane = drawn[0].axes[0].bbox
    assert all(plane.x0 <= b.x0 and b.x1 <= plane.x1 for b in boxes)


def test_lines_go_through_all_their_points(tmp_path, drawn):
    way = np.linspace(POINTS[0], POINTS[1], 5)
    picture(POINTS, path=tmp_path / "a.png", lines=[way, way[:2]])
    drawn_lines = drawn[0].axes[0].lines
    np.testing.assert_allclose(drawn_lines[0].get_xydata(), way, rtol=1e-6)
    ends = [line.get_xydata()[0] for line in drawn_lines[1:3]]
    np.testing.assert_allclose(ends, way[[0, -1]], rtol=1e-6)
    assert len(drawn_lines) == 6


def test_a_picture_that_fails_leaves_the_old_one_and_nothing_beside_it(tmp_path, monkeypatch):
    path = picture(POINTS, path=tmp_path / "a.png")
    before = path.read_bytes()

    def torn(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(OSError, match="disk full"):
        picture(POINTS[:3], path=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_it_appears_under_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    seen, save = [], Figure.savefig
    late = lambda self, *args, **options: (
        save(self, *args, **options),
        seen.extend(p.name for p in tmp_path.iterdir()),
    )
    monkeypatch.setattr(Figure, "savefig", late)
    picture(POINTS, path=tmp_path / "a.png")
    assert len(seen) == 1 and seen[0].startswith(".a.png.") and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    assert picture(POINTS, path=tmp_path / "link.png") == tmp_path / "real.png"
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "real.png").is_file()


def test_pyplot_is_not_touched(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    picture(POINTS, CLASSES, path=tmp_path / "a.png", labels=CLASSES)
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    true = builtins.__import__

    def blocked(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return true(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'eqx_transformers\[train\]'"):
        picture(POINTS, path=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# ---- errors

draw = lambda points=POINTS, colours=None, path="a.png", **options: picture(points, colours, path=path, **options)
REFUSED = {
    "a way between shapes": (lambda: interpolate(A, B[0], 3), r"one shape, but a is \(3, 5\), b is \(5,\)"),
    "one step": (lambda: interpolate(A, B, 1), "steps = 1 must be 2 or more"),
    "a kind": (lambda: interpolate(A, B, 3, kind="cubic"), "kind = 'cubic' one of linear, spherical"),
    "an analogy": (lambda: analogy(A, B, C[:1]), r"c is \(1, 5\)"),
    "two latents": (lambda: principal_plane(CLOUD[:2]), r"3 latents of 2 numbers at least, .* \(2, 3, 5\)"),
    "one number": (lambda: principal_plane(CLOUD[:, :1, 0]), r"3 latents of 2 numbers at least, .* \(60, 1\)"),
    "no axis": (lambda: principal_plane(jnp.asarray(1.0)), r"the latents are \(\)"),
    "another shape": (lambda: principal_plane(CLOUD)(CLOUD[:, 0]), r"one of latents \(3, 5\), but these are \(60, 5\)"),
    "rows": (lambda: table(["a"], [0, 1]), "there are 1 rows and 2 ratios"),
    "a suffix": (lambda: draw(path="plane.jpg"), r"as \.png or \.svg, but the path is 'plane.jpg'"),
    "triples": (lambda: draw(np.zeros((4, 3))), r"finite pairs of numbers, but these are \(4, 3\)"),
    "NaN": (lambda: draw(np.full((4, 2), np.nan)), "or some are not finite"),
    "labels": (lambda: draw(labels=["a"]), "there are 12 and 1"),
    "colours": (lambda: draw(colours=[1.0, 2.0]), r"there are 12 and an array \(2,\)"),
    "classes": (lambda: draw(np.zeros((43, 2)), np.arange(43)), "are 43 classes, of 42 that can be told apart"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(unchecked, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        call()
    assert not list(tmp_path.iterdir())


def test_the_palette_is_as_large_as_it_says():
    assert math.gcd(len(pictures.COLOURS), len(pictures.MARKERS)) == 1
    assert len(set(pictures.COLOURS)) * len(set(pictures.MARKERS)) == 42
