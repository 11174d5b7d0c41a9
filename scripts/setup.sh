# Sourced by the scripts beside this file, from the root of the repository.
# `set_up` makes .venv and installs this package; `set_up test` with the extra `test` as well.

fail() {
    echo "error: $*" >&2
    exit 1
}

is_supported() { # PYTHON: it runs, and is new enough
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    set -- python3 python3.14 python3.13 python3.12 python3.11
    [ -z "${PYTHON-}" ] || set -- "$PYTHON"
    for candidate in "$@"; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    found=$("$1" --version 2>&1) || found="no $1"
    fail "Python 3.11 or newer is needed, found: $found. Name one: PYTHON=/path/to/python3 sh $0"
}

make_venv() {
    if is_supported .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python) || exit 1
    echo "==> making .venv" >&2
    rm -rf .venv
    "$python" -m venv .venv ||
        fail "'$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv"
}

set_up() { # [EXTRA]
    make_venv
    wanted=$(cat pyproject.toml constraints.txt dora_convert/__init__.py | cksum)
    for stamp in ".venv/installed-${1:-plain}" .venv/installed-test; do
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
            return
        fi
    done
    echo "==> installing dora-convert${1:+[$1]} into .venv (minutes, the first time)" >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check \
        -c constraints.txt -e ".${1:+[$1]}" </dev/null || fail "the installation failed"
    echo "$wanted" >".venv/installed-${1:-plain}"
}
