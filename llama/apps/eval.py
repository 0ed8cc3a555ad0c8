"""`llama eval`: tasks of lm-evaluation-harness."""

from typing import Optional

from llama.apps.options import ScoringModel


def evaluate(
    model: ScoringModel,
    *,
    tasks: str,
    limit: Optional[int] = None,
    num_fewshot: Optional[int] = None,
    include_path: Optional[str] = None,
    parse_special: bool = False,
    json: bool = False,
) -> None:
    """Run tasks of lm-evaluation-harness and print its table of results.

    The harness fetches the tasks' data from the network, unless they are in its cache. Questions
    longer than --max-seq-len lose their beginning.

    Args:
        tasks: names, separated by commas: arc_easy,hellaswag.
        limit: examples of each task; all by default. Results on a part say little.
        num_fewshot: solved examples before each question; by default what the task says.
        include_path: a directory with tasks of your own, in the harness's YAML.
        parse_special: names of special tokens in a task's texts become control tokens, as in the
            harness's own hf models; by default they are text.
        json: print the harness's results as one JSON object instead of the table.

    Raises:
        ValueError: options out of range, the harness isn't installed, an unknown task, or what
            `Llama.build` raises.
    """
    from json import dumps

    for name, value, least in (("limit", limit, 1), ("num-fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")

    from llama.apps import evaluation
    from llama.generation import Llama
    from llama.layers import parallel

    manager = evaluation.TaskManager(include_path=include_path)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ValueError(
            f"unknown tasks: {', '.join(unknown) or repr(tasks)}; `lm-eval ls tasks` lists those "
            "there are, and include_path adds your own"
        )
    results = evaluation.lm_eval.simple_evaluate(
        evaluation.HarnessModel(Llama.build(**vars(model)), parse_special), tasks=names,
        num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False,
    )  # fmt: skip
    if results is None or not parallel.is_rank_zero():
        return
    if json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        print(dumps({key: results[key] for key in kept if key in results}, default=str))
    else:
        print(evaluation.make_table(results))
        if results.get("groups"):
            print(evaluation.make_table(results, "groups"))
