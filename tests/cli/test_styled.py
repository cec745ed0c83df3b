"""Plain lines are what Rich would put down without colours, and a command that paints nothing leaves it out."""

import io
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from regraft.cli.styled import Column, Indented, Table, Text, plain_lines

WIDTH = 10_000
BASE = Path(__file__).parents[1] / "golden/bases/mixtral"

words = st.text(st.sampled_from("ab é…模[]:/ \n"), max_size=12)
names = st.text(st.sampled_from("ab é"), min_size=1, max_size=5)
filled = words.filter(str.strip)
texts = st.builds(Text, words, st.sampled_from(["", "bold", "green"]))
assembled = st.builds(
    Text.assemble, words, texts, st.tuples(words, st.sampled_from(["dim", "bold red"]))
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    sides = draw(st.lists(st.sampled_from(["left", "right"]), min_size=1, max_size=3))
    columns = [Column(draw(names), side, wrapped=draw(st.booleans())) for side in sides]
    table = Table(*columns, header=draw(st.booleans()), gap=draw(st.integers(1, 3)))
    first = words | texts if table.header else filled  # Rich gives a column of nothing a line more
    cells = st.tuples(*[first] * len(sides))
    for row in draw(st.lists(cells, max_size=3)):
        table.add_row(*row)
    return table


def painted(part: object) -> list[str]:
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        color_system=None,
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as captured:
        console.print(part)
    return [line.rstrip() for line in captured.get().split("\n")[:-1]]


@settings(max_examples=60, deadline=None)
@given(
    words
    | texts
    | assembled
    | st.builds(Indented, assembled.filter(lambda text: text.plain.strip()), st.integers(0, 3))
    | tables()
)
def test_plain_lines_are_those_of_rich(part: object) -> None:
    assert plain_lines([part], WIDTH) == painted(part)


def test_what_only_rich_can_do_is_left_to_it() -> None:
    for part in ("a\tb", "\x1b[31m", "x" * WIDTH, object()):
        assert plain_lines([part], WIDTH) is None


def test_a_command_that_paints_nothing_does_without_rich(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom regraft.cli import main\n"
        "main(['convert', sys.argv[1], sys.argv[2], '--to', 'transformers-v5', '--dry-run'])\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'rich'])"
    )
    command = [sys.executable, "-c", code, str(BASE), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("this was a dry run.\n[]\n")
