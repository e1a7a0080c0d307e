"""What an LLM's scheduler decided is written to a folder, and `seamwise replay` plans it again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from seamwise import LLM, SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.replay import Recording, record_in, replay
from seamwise.runtime.serve.cli import main


def test_an_llm_is_replayed(
    tiny_llama_dir: Path, pack_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM(
        tiny_llama_dir, device="cpu", skip_tokenizer_init=True, max_num_batched_tokens=16, max_model_len=32,
        num_gpu_blocks_override=12, block_size=4, max_num_seqs=4, pack_dir=pack_dir,
        decisions_dir=tmp_path / "decisions",
    )  # fmt: skip
    prompts = [{"prompt_token_ids": list(range(3, 12 + i))} for i in range(6)]
    llm.generate(prompts, SamplingParams(max_tokens=9, ignore_eos=True, detokenize=False))
    llm.shutdown()
    (path,) = (tmp_path / "decisions").iterdir()
    lines = path.read_text().splitlines()
    assert len(lines) > 20, "preempted, in chunks: the header and a line for each step"
    assert main(["replay", str(path)]) == 0
    assert f"{path}: {len(lines) - 1} steps, each planned as it was" in capsys.readouterr().out

    path.write_text("\n".join(lines)[:-9])  # its process was killed
    assert replay(path) == len(lines) - 2
    step = next(i for i, line in enumerate(lines) if '"grants":[[' in line)
    lines[step] = lines[step].replace('"grants":[[', '"grants":[[7,1],[')
    path.write_text("\n".join(lines) + "\n")
    assert main(["replay", str(path)]) == 2
    assert f"step {step} was planned as" in capsys.readouterr().err
    path.write_text("{}\tx\n")
    assert main(["replay", str(path)]) == 2 and main(["replay", str(tmp_path / "none")]) == 2
    assert "not the limits of a recording" in (said := capsys.readouterr().err) and "no such file" in said


def test_a_folder_that_cannot_be_and_a_disk_that_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"decisions_dir=.*wanted a folder that can be written"):
        record_in(tmp_path / "file", SchedulerConfig())
    recorder = Recording(tmp_path / "trace", SchedulerConfig())
    recorder._file.close()
    recorder._file = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            recorder(None, None)  # type: ignore[arg-type]
    assert [r.message for r in caplog.records] == [
        "decisions are not recorded any more: /dev/full: [Errno 28] No space left on device"
    ]
