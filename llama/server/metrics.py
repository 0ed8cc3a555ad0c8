"""Metrics for Prometheus, under the names that dashboards of vLLM know."""

from typing import Any, Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from llama.engine.engine import Stats

_SHORT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)


class Metrics:
    """The metrics of a server.

    Args:
        labels: of all of them, such as the model's name.
        stats: what the engine is doing.
    """

    def __init__(self, labels: Mapping[str, str], stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        self._labels, self._stats = labels, stats

        def made(kind: Any, name: str, about: str, **options: Any) -> Any:
            labels = options.pop("labels", [])
            metric = kind(
                f"vllm:{name}", about, [*self._labels, *labels], registry=self._registry, **options
            )
            return metric if labels else metric.labels(**self._labels)

        self.prompt_tokens = made(Counter, "prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = made(Counter, "generation_tokens", "Tokens of answers.")
        self.first = made(
            Histogram, "time_to_first_token_seconds", "From arrival to the first token.",
            buckets=_LONG,
        )  # fmt: skip
        self.between = made(
            Histogram, "inter_token_latency_seconds", "Between two tokens.", buckets=_SHORT
        )
        self.whole = made(
            Histogram, "e2e_request_latency_seconds", "From arrival to the last token.",
            buckets=_LONG,
        )  # fmt: skip
        self._ended = made(
            Counter, "request_success", "Requests that have ended.", labels=["finished_reason"]
        )
        self._registry.register(self)

    def ended(self, reason: str) -> None:
        self._ended.labels(*self._labels.values(), reason).inc()

    def collect(self) -> Iterator[Any]:
        """What the engine knows, asked when somebody looks."""
        stats = self._stats()
        for kind, name, about, value in (
            (GaugeMetricFamily, "num_requests_running", "Running requests.", stats.running),
            (GaugeMetricFamily, "num_requests_waiting", "Waiting requests.", stats.waiting),
            (
                GaugeMetricFamily, "kv_cache_usage_perc", "Share of the cache in use, 0 to 1.",
                stats.blocks_used / stats.blocks,
            ),
            (
                CounterMetricFamily, "prefix_cache_queries", "Tokens looked up in the cache.",
                stats.queried_tokens,
            ),
            (
                CounterMetricFamily, "prefix_cache_hits", "Tokens found in the cache.",
                stats.cached_tokens,
            ),
            (
                CounterMetricFamily, "num_preemptions", "Requests that lost their blocks.",
                stats.preemptions,
            ),
        ):  # fmt: skip
            metric = kind(f"vllm:{name}", about, labels=[*self._labels])
            metric.add_metric([*self._labels.values()], value)
            yield metric

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
