"""Pictures know the numbers that they show."""

from matplotlib.figure import Figure

from benchmarks.claims_pictures import Drawing, is_drawn, save_drawing


def test_a_picture_knows_its_note(tmp_path):
    path, drawing = tmp_path / "picture.png", Drawing("greedy +3.0", Figure)
    assert not is_drawn(path, drawing)
    save_drawing(path, drawing)
    assert is_drawn(path, drawing)
    assert not is_drawn(path, drawing._replace(note="greedy +4.0"))


def test_no_file_is_a_picture_that_should_not_be_there(tmp_path):
    path = tmp_path / "picture.png"
    save_drawing(path, Drawing("greedy +3.0", Figure))
    assert not is_drawn(path, None)


def test_a_damaged_file_is_no_picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG")
    assert not is_drawn(path, Drawing("", Figure))
