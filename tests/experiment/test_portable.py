"""Results without paths of a machine."""

import pytest

from experiment.portable import paths_in, portable


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/x.npz", "x.npz"),
        ("~/x/y.pth", "y.pth"),
        ("python e.py --c '/home/me/my data/x' --o=/tmp/x/", "python e.py --c 'my data/x' --o=x"),
        ("net:weights=/q/r.pth,/s/t", "net:weights=r.pth,t"),
        ("read from /tmp/p.json; then", "read from p.json; then"),
    ],
)
def test_of_a_path_the_last_name_is_kept(text, kept):
    assert portable({"a": [text, 1, None]}) == {"a": [kept, 1, None]}
    assert list(paths_in({"a": {"b": [1, text]}}))[0][0] == "a.b.1" and not list(paths_in(kept))


@pytest.mark.parametrize(
    "text",
    ["https://x.y/z/w.pth", "runs/a/b.pth", "../x", "MACs / image", "1/2", "images/s", "timm/resnet18"],
)
def test_what_is_no_path_of_a_machine_is_kept_whole(text):
    assert portable(text) == text and not list(paths_in([text]))
