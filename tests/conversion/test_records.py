"""What conversion hands back beside a model: where it came from, and how far it is from the reference."""

import json

from converters import Origin, Verification
from converters.verify import Layer


def test_an_origin_goes_through_json_and_later_versions_fields_are_left_out():
    origin = Origin(
        "repo", "bert", "BertModel", {"x": 1}, layout={"model.safetensors": ["a", "b"]}, files=["vocab.txt"]
    )
    there = json.loads(json.dumps(origin.as_json()))
    assert Origin.from_json(there) == origin
    assert Origin.from_json(there | {"of_version_2": 0}) == origin


def test_label_names_come_in_the_order_of_their_numbers():
    names = {str(i): f"label {i}" for i in (10, 2, 0)}
    assert Origin("", "", "", {"id2label": names}).labels == ["label 0", "label 2", "label 10"]
    assert Origin("", "", "", {}).labels is None


def verification(*errors, weights=None, gradients=None):
    layers = tuple(Layer(f"blocks.{i}", f"layer.{i}", error) for i, error in enumerate(errors))
    return Verification(1e-5, layers, weights or {}, gradients or {})


def test_a_verification_passes_when_no_error_is_above_its_tolerance():
    good = verification(1e-6, 1e-5, gradients={"w": 1e-6})
    assert good.passed and good.first_divergence is None and good.max_error == 1e-5
    assert "verified: max error 1.0e-05 (at blocks.1" in str(good)
    assert json.loads(json.dumps(good.as_json()))["passed"] is True


def test_the_first_divergence_is_the_first_layer_then_tensor_then_gradient():
    bad = [
        (verification(1e-6, 1.0, 2.0, weights={"w": "head.w"}), "blocks.1"),
        (verification(1e-6, float("nan")), "blocks.1"),  # NaN is above no tolerance and below none: it is an error
        (verification(1e-6, weights={"w": "head.w"}, gradients={"g": 1.0}), "head.w"),
        (verification(1e-6, gradients={"g": float("nan")}), "g"),
    ]
    for result, first in bad:
        assert not result.passed and result.first_divergence == first
        assert f"NOT verified: {first}" in str(result)
