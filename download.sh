#!/usr/bin/env bash
#
# Fetches model files into checkpoints/, as Meta's script of this name does. `llama download` does
# the work; here its Python is found, and options become its own. Kept to macOS's bash, 3.2.
set -euo pipefail

here=$(cd -- "$(dirname -- "$0")" && pwd)

usage() {
    cat <<EOF
Usage: ./download.sh [--out DIR] [--models LIST] [smollm2] [tokenizer]
       ./download.sh [--out DIR] --source hf REPO...
       ./download.sh --list

With no arguments it asks for the link that Meta sends by e-mail (request one at
https://llama.meta.com/llama-downloads/) and for the models to fetch with it.

  smollm2        a small demo model, SmolLM2-135M-Instruct Q4_1 (98 MB, Apache-2.0); no link needed
  tokenizer      Llama 3's tokenizer.model (2 MB, Llama 3 Community License); no link needed
  --models LIST  names from --list, separated by commas, in capitals or not; Llama 3 has the short
                 names 8B,8B-instruct,70B,70B-instruct. A link serves one family: Llama 2, 3, 3.1, ...
  --source hf    fetch from huggingface.co instead. REPO is OWNER/NAME (its safetensors, or else its
                 .bin files, and its tokenizer) or OWNER/NAME/FILE (one file, such as a .gguf)
  --list         every model with its size and its number of files
  --out DIR      where the model folders go (default: checkpoints/ beside this script)
  -h, --help     this text

Environment:
  PRESIGNED_URL  the link from the e-mail; no option, as every user can read command lines
  HF_TOKEN       your Hugging Face token, for gated models (no option either); \`hf auth login\`
                 does instead. HF_ENDPOINT: another server than https://huggingface.co
  PYTHON         the Python with this package (default: .venv/bin/python here, else python3)
  LLAMA_CACHE    where smollm2 and tokenizer are kept (default: ~/.cache/llama-reference, on Linux)

Examples:
  ./download.sh smollm2
  ./download.sh
  read -rs PRESIGNED_URL && export PRESIGNED_URL    # paste the link, press Enter
  ./download.sh --models Llama-3.2-1B,Llama-3.2-1B-Instruct
  ./download.sh --source hf meta-llama/Llama-3.2-1B-Instruct

After an interruption run the same command again: complete files are kept, partial ones resumed.
EOF
}
die() { printf 'download.sh: %s\n' "$*" >&2; exit 1; }
misuse() { printf 'download.sh: %s\n' "$*" "see ./download.sh --help" >&2; exit 2; }

out=$here/checkpoints source=meta list='' words=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --list) list=--list ;;
        --models | --out | --source)
            [ -n "${2-}" ] || misuse "$1 needs a value"
            case $1 in --out) out=$2 ;; --models) words+=("$2") ;; --source) source=$2 ;; esac
            shift ;;
        -*) misuse "unknown argument '$1'" ;;
        *) words+=("$1") ;;
    esac
    shift
done
case $source in hf | meta) ;; *) misuse "--source $source is unknown; there are meta and hf" ;; esac
meta=''
if [ "${#words[@]}" = 0 ] && [ -z "$list" ]; then meta=--meta; fi
[ "$source$meta" != hf--meta ] || misuse "--source hf needs a repository, OWNER/NAME"
for word in ${words[@]+"${words[@]}"}; do # bash 3.2 holds an empty list for unset
    [[ $source != hf || $word == */* ]] ||
        misuse "'$word' is not OWNER/NAME or OWNER/NAME/FILE, as --source hf needs it"
done

python=${PYTHON-}
if [ -z "$python" ]; then
    python=python3
    for venv in .venv-cuda .venv-cpu .venv; do # as `make` names them: the last one counts
        if [ -x "$here/$venv/bin/python" ]; then python=$here/$venv/bin/python; fi
    done
fi
command -v "$python" >/dev/null || die "$python was not found; set PYTHON to a Python 3.11 or newer"
# -P: what is installed counts, and not that this folder may be the current one.
"$python" -P -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("llama"))' 2>/dev/null ||
    die "$python has no llama package (or is older than 3.11); install it: $python -m pip install $here"
exec "$python" -P -m llama.apps.cli download ${words[@]+"${words[@]}"} "--out=$out" $meta $list
