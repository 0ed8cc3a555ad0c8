from pathlib import Path

from setuptools import find_packages, setup

CHAT = ["prompt_toolkit>=3.0", "rich>=13"]
FLAX = ["flax>=0.12", "jax>=0.7"]
PEERS = ["transformers>=5", "accelerate", "llama-models==0.3.0", "xllamacpp"]

setup(
    name="llama-reference",
    version="0.1.0",
    description="The Llama reference inference repository: any checkpoint, ranks and device",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama.backends.cpu": ["*.cpp", "*.h"]},
    python_requires=">=3.11",
    entry_points={"console_scripts": ["llama = llama.apps.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "fairscale==0.4.13",
        "tiktoken>=0.12",
        "fire",
        "blobfile",
        "filelock>=3.12",
        "gguf>=0.17",
        "huggingface_hub>=1.0",
        "jinja2>=3.1.6",
        "numpy",
        "platformdirs>=4",
        "protobuf",
        "psutil",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        "chat": CHAT,
        "eval": ["lm_eval>=0.4.13"],
        "structured": ["llguidance>=1.9"],
        "train": ["matplotlib"],
        "flax": FLAX,
        "notebook": ["ipykernel", "matplotlib"],
        "bench": [*PEERS, "matplotlib"],
        "test": [
            *PEERS,
            *CHAT,
            *FLAX,
            "lm_eval>=0.4.13",
            "pexpect",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "jsonschema",
            "llguidance>=1.9",
            "nbclient",
            "nbformat",
            "ipykernel",
            "matplotlib",
            "mypy",
            "peft>=0.18",
            "ruff",
        ],
    },
)
