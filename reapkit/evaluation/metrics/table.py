"""Lists every metric, one record each; gates, tables, pages and cards read this table. Torch-free.

`metrics/rows.py` computes what is measured on rows, `generation.py` what on continuations, `throughput.py` the speeds;
a test demands that they and this table agree.
"""

from __future__ import annotations

from collections.abc import Mapping

from reapkit.evaluation.metrics.metric import Better, Metric, View


def _views(*views: View) -> frozenset[View]:
    return frozenset(views)


def _generated(name: str, title: str, meaning: str, better: Better) -> Metric:
    return Metric(name, title, title, meaning, better, "generation", unit="share", digits=1)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "perplexity",
            "perplexity",
            "perplexity",
            "how many tokens it hesitates between on average",
            "lower",
            views=_views("final", "narrow", "summary"),
        ),
        Metric(
            "perplexity_ratio",
            "perplexity ratio",
            "perplexity ratio",
            "how much worse it predicts the text; 1 is as good as the base",
            "lower",
            same_as_base=1.0,
            views=_views("gates", "final", "distances", "summary"),
        ),
        Metric(
            "kl_mean",
            "mean KL",
            "mean KL",
            "how far its predictions are from the base's, in nats; 0 is the same",
            "lower",
            unit="nats",
            digits=4,
            same_as_base=0.0,
            views=_views("gates", "final", "narrow", "distances", "summary"),
        ),
        Metric(
            "top1_agreement",
            "top-1 agreement",
            "top-1 agreement",
            "share of tokens on which it would say what the base says",
            "higher",
            unit="share",
            digits=1,
            same_as_base=1.0,
            views=_views("gates", "final", "narrow", "distances", "summary"),
        ),
        Metric(
            "conflict_rate_delta",
            "change of confident conflicts",
            "conflicts",
            "change in the share of tokens on which it is sure and wrong",
            "nearer",
            unit="share",
            digits=2,
            same_as_base=0.0,
            views=_views("gates", "summary"),
        ),
        Metric(
            "loop_share_delta",
            "change of looping continuations",
            "loops",
            "change in the share of continuations that repeat themselves",
            "lower",
            kind="generation",
            unit="share",
            digits=2,
            same_as_base=0.0,
            views=_views("gates"),
        ),
        Metric(
            "js_distance",
            "distance of the (p, entropy) histograms",
            "JS",
            "how differently its certainty is distributed, 0 to 1; 0 is the same",
            "lower",
            same_as_base=0.0,
            views=_views("summary"),
        ),
        Metric(
            "nll", "negative log-likelihood", "NLL", "how badly it predicts the text, per token", "lower", unit="nats"
        ),
        Metric(
            "nll_delta",
            "change of the negative log-likelihood",
            "NLL change",
            "how much worse it predicts the text, per token",
            "lower",
            unit="nats",
            same_as_base=0.0,
        ),
        Metric(
            "kl_median", "median KL", "KL median", "the KL that half the tokens exceed", "lower", unit="nats", digits=4
        ),
        Metric(
            "kl_p90",
            "90th percentile of the KL",
            "KL 90 %",
            "the KL that a tenth of the tokens exceed",
            "lower",
            unit="nats",
            digits=4,
        ),
        Metric(
            "kl_p99",
            "99th percentile of the KL",
            "KL 99 %",
            "the KL that a hundredth of the tokens exceed",
            "lower",
            unit="nats",
            digits=4,
        ),
        Metric(
            "kl_mean_delta",
            "KL that a control loses more",
            "KL change",
            "by how much the control's mean KL exceeds the candidate's, in nats",
            "higher",
            unit="nats",
            digits=4,
        ),
        Metric(
            "p_mean",
            "mean probability of the text",
            "p",
            "the probability that it gives the token that follows",
            "higher",
        ),
        Metric(
            "p_mean_delta",
            "change of the mean probability of the text",
            "p change",
            "change of the probability that it gives the token that follows",
            "higher",
            same_as_base=0.0,
        ),
        Metric(
            "entropy_mean", "mean entropy", "entropy", "how unsure it is, 0 to 1, over its likeliest tokens", "nearer"
        ),
        Metric(
            "conflict_rate",
            "confident conflicts",
            "conflict rate",
            "share of tokens on which it is sure and wrong, by the base's thresholds",
            "lower",
            unit="share",
            digits=2,
        ),
        Metric(
            "conflict_rate_own",
            "confident conflicts by its own thresholds",
            "own conflict rate",
            "share of tokens on which it is sure and wrong, by its own thresholds",
            "lower",
            unit="share",
            digits=2,
        ),
        _generated("loop_share", "loop", "share of continuations that repeat themselves", "lower"),
        _generated("greedy_loop_share", "greedy loop", "the same of greedy continuations", "lower"),
        _generated("sampled_loop_share", "sampled loop", "the same of sampled continuations", "lower"),
        _generated("unfinished_share", "unfinished", "share of continuations that do not end", "nearer"),
        _generated("distinct_4", "distinct 4", "share of different 4-grams in a continuation", "higher"),
        _generated("tool_call_validity", "tool call validity", "share of answers that are valid calls", "higher"),
        _generated("greedy_tool_call_validity", "greedy tool call validity", "the same of greedy answers", "higher"),
        _generated("sampled_tool_call_validity", "sampled tool call validity", "the same of sampled answers", "higher"),
        Metric(
            "unfinished_share_delta",
            "change of unfinished continuations",
            "unfinished change",
            "change in the share of continuations that do not end",
            "nearer",
            kind="generation",
            unit="share",
            digits=2,
            same_as_base=0.0,
        ),
        Metric(
            "tool_call_validity_delta",
            "change of valid tool calls",
            "tool call change",
            "change in the share of answers that are valid calls",
            "higher",
            kind="generation",
            unit="share",
            digits=2,
            same_as_base=0.0,
        ),
        Metric(
            "prefill_tokens_per_s",
            "prefill",
            "prefill",
            "how fast it reads a prompt",
            "higher",
            kind="throughput",
            unit="tokens/s",
        ),
        Metric(
            "decode_tokens_per_s",
            "decode",
            "decode",
            "how fast it writes, one token after another",
            "higher",
            kind="throughput",
            unit="tokens/s",
        ),
        Metric(
            "peak_bytes",
            "peak memory",
            "peak memory",
            "most memory that it held",
            "lower",
            kind="throughput",
            unit="bytes",
        ),
    )
}


def in_view(view: View) -> tuple[Metric, ...]:
    """The metrics that a view shows, in the table's order."""
    return tuple(metric for metric in METRICS.values() if view in metric.views)


def metric_of(name: str) -> Metric:
    """The record of a metric; of an unknown one, such as an older evaluation's, a record that shows its name."""
    return METRICS.get(name) or Metric(name, name, name, "", "nearer")


def is_generation(name: str) -> bool:
    """Whether a metric is measured on continuations instead of rows."""
    return metric_of(name).kind == "generation"


def metrics_table() -> str:
    """README's table of what recipes may limit and what final tables show, in Markdown."""
    shown = [metric for metric in METRICS.values() if metric.views & {"gates", "final"}]
    rows = [f"| `{metric.name}` | {metric.title} | {metric.meaning} | {metric.better} |" for metric in shown]
    return "\n".join(("| metric | is | says | better |", "|---|---|---|---|", *rows))
