"""From the engine's outputs, which hold what is new, to what is sent of them."""

from __future__ import annotations

from seamwise.runtime.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput

from .messages import Delta


class Deltas:
    """Which outputs of unfinished requests have ended: an end is sent once, though the engine repeats it."""

    def __init__(self) -> None:
        self._ended: dict[str, set[int]] = {}

    def follow(self, request_id: str) -> None:
        """Start on a request."""
        self._ended[request_id] = set()

    @property
    def unfinished(self) -> list[str]:
        return list(self._ended)

    def of(self, output: RequestOutput) -> list[Delta]:
        """Return what is new of a request's outputs."""
        ended = self._ended.get(output.request_id)
        if ended is None:
            return []
        found = []
        for completion in output.outputs:
            if completion.index not in ended and (completion.token_ids or completion.finish_reason is not None):
                found.append(_delta(output, completion))
                if completion.finish_reason is not None:
                    ended.add(completion.index)
        if found:
            found[0].prompt_logprobs = output.prompt_logprobs
        if output.finished:
            if found:
                found[-1].request_finished, found[-1].times_s = True, _times(output.metrics)
                found[-1].vector = None if output.vector is None else output.vector.astype("<f4").tobytes()
            del self._ended[output.request_id]
        return found


def _delta(output: RequestOutput, completion: CompletionOutput) -> Delta:
    return Delta(
        request_id=output.request_id, index=completion.index, text=completion.text, token_ids=completion.token_ids,
        logprobs=completion.logprobs, finish_reason=completion.finish_reason, stop_reason=completion.stop_reason,
        num_cached_tokens=output.metrics.num_cached_tokens, num_preemptions=output.metrics.num_preemptions,
    )  # fmt: skip


def _times(m: RequestMetrics) -> list[float]:
    """Return the seconds that a request waited, until its first token, and after it; nothing of one that had none."""
    if m.first_scheduled_time is None or m.first_token_time is None or m.finished_time is None:
        return []
    return [
        m.first_scheduled_time - m.arrival_time, m.first_token_time - m.first_scheduled_time,
        m.finished_time - m.first_token_time,
    ]  # fmt: skip
