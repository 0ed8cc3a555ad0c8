"""`llama complete`: a text, or each text of a file, continued plain or as shown by examples."""

from pathlib import Path
from typing import Literal, Optional

from llama.apps.options import GREEDY, CachingModel, FileName, GreedySampling, Text, Texts


def complete(
    model: CachingModel,
    sampling: GreedySampling = GREEDY,
    *,
    prompt: Optional[Text] = None,
    prompt_file: Optional[FileName] = None,
    image: Optional[Texts] = None,
    shots: Optional[Text] = None,
    template: Optional[Text] = None,
    instruction: Optional[Text] = None,
    max_gen_len: int = 64,
    n: int = 1,
    stop: Optional[Texts] = None,
    response_format: Optional[Text] = None,
    speculate: Optional[Literal["lookup", "draft", "off"]] = None,
    input: Optional[FileName] = None,
    output: Optional[FileName] = None,
    force: bool = False,
) -> None:
    """Continue a text and print what follows, or continue all texts of a JSONL file.

    With shots, an instruction or a template, the text is not continued: it takes the place of
    {input}, and what the model generates for {output} is printed.

    A file of texts can be interrupted at any moment: the same command goes on where it stopped,
    and the result is bit-identical to that of an uninterrupted run.

    Args:
        prompt: the text; "-" for stdin, which is also read if no prompt is given and it is no
            terminal.
        prompt_file: a file with the text, in UTF-8; "-" for stdin. One newline at the end of a file
            or of stdin is removed.
        image: a path or an address of an image that comes before the text, for models that see; may
            be given several times.
        shots: examples, 'sea => mer; bread => pain' (a ; or => that belongs to a text is written
            with a \\ before it), or a file with {"input": ..., "output": ...} on each line.
        template: how an example is written, {input} => {output} by default. The text after
            {output}, or else a newline, ends it.
        instruction: what stands above the examples.
        max_gen_len: new tokens at most, 0 or more.
        n: samples of each text, 1 to --max-batch-size; with --input, "generation" and
            "finish_reason" become lists.
        stop: a string at which the text ends, itself left out; may be given several times, or as a
            JSON list, '["\\n", "Q:"]'.
        response_format: structured outputs: JSON, or a file of it, that says what the text must
            be like, '{"type": "choice", "choice": ["yes", "no"]}' for example; the other types
            are json_object, json_schema, regex and grammar.
        speculate: speculative decoding, for the same text in less time: lookup proposes what
            followed the same words before, draft asks the draft model.
        input: JSONL: {"prompt": ...}, or with examples {"input": ...}, on each line; other keys
            are kept.
        output: JSONL: the lines of --input, each with "generation" and "finish_reason".
        force: replace an existing output, and what is left of an interrupted run with other
            options.

    Raises:
        ValueError: options that don't go together or are out of range; a broken line, by file and
            number; what `Llama.build` and `text_completion` raise.
        FileNotFoundError, FileExistsError: a file that isn't there, or an output that is.
    """
    from llama.apps import completion
    from llama.engine.params import SamplingParams
    from llama.generation import Llama
    from llama.layers import parallel
    from llama.text.few_shot import TEMPLATE, FewShot, read_shots

    for name, value, least in (("max_gen_len", max_gen_len, 0), ("n", n, 1)):
        if value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")
    if n > model.max_batch_size:
        raise ValueError(f"n={n} is more than max_batch_size={model.max_batch_size}: raise that")
    few_shot = None
    if any(given is not None for given in (shots, template, instruction)):
        examples = [] if shots is None else read_shots(shots)
        few_shot = FewShot(examples, TEMPLATE if template is None else template, instruction)
    options = {
        "max_gen_len": max_gen_len, "params": SamplingParams(**vars(sampling)), "n": n,
        "stop": completion.read_stops(stop or []) + ([few_shot.stop] if few_shot else []),
        "speculate": speculate, "response_format": completion.read_format(response_format),
    }  # fmt: skip
    parallel.initialize(device=model.device, timeout=model.rank_timeout)
    if input is None and output is None:
        text = parallel.on_rank_zero(lambda: completion.read_prompt(prompt, prompt_file))
        text = few_shot.prompt(few_shot.without_separator(text)) if few_shot else text
        llama = Llama.build(**{**vars(model), "prefix_cache_mb": 0})  # of use to files alone
        images = [{"type": "image", "image": one} for one in image or []]
        shown = [*images, text] if images else text
        completion.show(llama, shown, {**options, "seed": model.seed}, strip=few_shot is not None)
    elif input is None or output is None:
        raise ValueError("--input and --output belong together: give both files")
    elif any(given is not None for given in (prompt, prompt_file, image)):
        raise ValueError("--prompt, --prompt_file and --image don't go with --input: choose one")
    else:
        completion.complete_file(
            Path(input), Path(output), few_shot, vars(model), options, model.seed, force
        )
