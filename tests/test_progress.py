import io

from rich.console import Console

from l2m_jax.progress import Bar


def test_off_a_terminal_every_tenth_is_a_line():
    out = io.StringIO()
    with Bar(Console(file=out), "preparing", 50, "songs") as bar:
        for done in range(1, 51):
            bar.update(done)
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("preparing: 5 of 50 songs, ") and lines[-1].startswith("preparing: 50 of 50 songs, 0 s")


def test_lines_on_request_and_seconds_left_from_where_it_began():
    out = io.StringIO()
    bar = Bar(Console(file=out), "training", 100, "steps", done=90)
    bar.update(91, "loss 3", line=True)
    bar.update(92, "loss 2", line=False)
    assert out.getvalue().startswith("loss 3: 91 of 100 steps, ") and "loss 2" not in out.getvalue()


def test_on_a_terminal_it_is_live():
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=100), "singing", 10, "s") as bar:
        bar.update(10)
    assert "10 of 10 s" in out.getvalue()
