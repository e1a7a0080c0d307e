"""For those who build on the runner's protocol: what every runner must do, as tests, and a runner without a model."""

from seamwise.runtime.runner.conformance import RunnerConformance
from seamwise.runtime.runner.fake_runner import FakeRunner

__all__ = ["FakeRunner", "RunnerConformance"]
