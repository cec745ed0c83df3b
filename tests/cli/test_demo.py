"""The demonstration runs, and its proofs can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from regraft.demo import proof, story

GOLDEN = Path(__file__).parents[1] / "golden"
PROBE = """
import sys
from regraft.demo.story import main
status = main()
assert "torch" not in sys.modules
sys.exit(status)
"""


def test_runs_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "FAILED" not in done.stdout
    assert "bit for bit" in done.stdout
    assert "\x1b" not in done.stdout


def test_keeps_the_result_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert story.main([str(tmp_path / "kept")]) == 0
    assert (tmp_path / "kept" / "transformers-v5" / "adapter_model.safetensors").is_file()
    last = capsys.readouterr().out.splitlines()[-1]
    assert str(tmp_path / "kept" / "transformers-v5") in last


@pytest.mark.parametrize("broken", ["deltas_v5", "swap_experts"])
def test_a_proof_that_fails_is_told(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken == "deltas_v5":
        right = proof.deltas_v5
        monkeypatch.setattr(
            proof, "deltas_v5", lambda c, t, e: right(c, proof.swap_experts(t, e), e)
        )
    else:
        monkeypatch.setattr(proof, "swap_experts", lambda tensors, experts: tensors)
    assert story.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_bundled_adapter_is_the_tested_one() -> None:
    data = Path(story.__file__).parent / "data"
    case = GOLDEN / "cases" / "mixtral__gud_attn"
    base = GOLDEN / "bases" / "mixtral"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (data / "adapter" / name).read_bytes() == (case / name).read_bytes()
    assert (data / "base/config.json").read_bytes() == (base / "config.json").read_bytes()
