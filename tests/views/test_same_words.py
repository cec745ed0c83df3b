"""A check says the same of a tensor on the page as in the terminal, whatever it is checked for."""

from regraft.checking.check import _FATES as CHECKED
from regraft.checking.verdict import OUTCOMES
from regraft.dialects import judging
from regraft.views.data import _FATES, _OUTCOMES
from regraft.views.model import STATES


def test_page_and_terminal_have_one_word_for_each_outcome():
    assert _OUTCOMES.keys() == OUTCOMES.keys()
    for outcome, state in _OUTCOMES.items():
        assert STATES[state].label == OUTCOMES[outcome][0]
        assert (STATES[state].tone == "good") == (outcome == "lands")


def test_a_tool_and_the_installed_peft_have_one_word_for_each_outcome():
    assert _FATES.keys() == judging.OUTCOMES.keys() == CHECKED.keys() | {judging.UNKNOWN}
    for fate, outcome in CHECKED.items():
        assert judging.OUTCOMES[fate] == OUTCOMES[outcome][1]
        assert STATES[_FATES[fate]].label == OUTCOMES[outcome][0]
    assert STATES[_FATES[judging.UNKNOWN]].label == judging.OUTCOMES[judging.UNKNOWN]
