# shellcheck shell=bash
# For setup_env.sh, which sources this file: check the machine, find or fetch a Python for .venv,
# explain a failed download. $here, $venv and the functions log and die are those of setup_env.sh.

: "${here:?}" "${venv:?}"
pythons="Python 3.9, 3.10, 3.11 or 3.12"
standalone=$venv/python # where uv installs Python
releases=https://github.com/astral-sh/python-build-standalone/releases/download

# Print the command that installs a package: the names are those of Debian and of Fedora.
install_command() {
    if command -v apt-get >/dev/null; then
        echo "apt-get install $1"
    elif command -v dnf >/dev/null; then
        echo "dnf install $2"
    elif command -v zypper >/dev/null; then
        echo "zypper install $2"
    else
        echo "install your distribution's package of $1"
    fi
}

# Called before anything that needs bash 4: macOS has bash 3.2.
check_system() {
    local system
    system=$(uname -s)
    case $system in
        Linux) ;;
        MINGW* | MSYS* | CYGWIN*)
            die "this is Windows, and MXNet and DALI need Linux: run this command in WSL 2," \
                "in a folder of its Linux file system"
            ;;
        *)
            die "this machine runs $system, and MXNet and DALI need Linux on x86-64: use such a" \
                "machine, or the image of Dockerfile.cpu (docker build --platform linux/amd64)"
            ;;
    esac
}

# Open MPI's package needs glibc 2.28, those of MXNet and DALI an older one.
check_libc() {
    local libc
    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || libc=""
    case $libc in
        "glibc "*)
            [ "$(printf '%s\n' 2.28 "${libc#glibc }" | sort -V | head -n 1)" = 2.28 ] ||
                die "this machine has $libc, and Open MPI's package needs glibc 2.28 or newer:" \
                    "use Debian 10, Ubuntu 20.04, RHEL 8 or newer, or the image of Dockerfile.cpu"
            ;;
        *)
            ! { ldd --version 2>&1 || true; } | grep -qi musl ||
                die "this machine has the C library musl, as Alpine has, and MXNet and DALI need" \
                    "glibc: use Debian, Ubuntu or RHEL, or the image of Dockerfile.cpu"
            ;;
    esac
}

# Any x86-64 CPU will do, also one without AVX: MXNet, DALI and OpenCV choose their instructions
# when they run, and Horovod is compiled for the CPU of this machine.
check_machine() {
    local machine
    machine=$(uname -m)
    [ "$machine" = x86_64 ] ||
        die "the CPU of this machine is $machine, and MXNet and DALI exist for x86-64 only: use" \
            "such a machine, or the image of Dockerfile.cpu with an emulated CPU" \
            "(docker build --platform linux/amd64)"
    [ "$(getconf LONG_BIT 2>/dev/null || echo 64)" = 64 ] ||
        die "this is a 32-bit system, and MXNet and DALI exist for 64 bits only"
    check_libc
    case $here in
        *[[:space:]]*)
            die "the path $here contains a space, and Horovod cannot be built in such a path:" \
                "move the folder"
            ;;
    esac
    command -v c++ >/dev/null ||
        die "no C++ compiler (c++) found, which is needed to build Horovod:" \
            "$(install_command g++ gcc-c++)"
}

# Print "yes" if .venv can be created with a Python, "no" and the reason if not, and nothing if
# there is no such command. NumPy 1, which MXNet 1.9.1 needs, and DALI 1.34 have no packages for
# Python 3.13 or newer.
examine_python() {
    "$1" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 9) <= sys.version_info[:2] <= (3, 12):
    print("no " + version)
elif sys.implementation.name != "cpython" or sys.maxsize < 2**32:
    print("no %s (%s, %d bits)" % (version, sys.implementation.name, sys.maxsize.bit_length() + 1))
else:
    try:
        import ctypes, ensurepip, ssl, venv, zlib
        print("yes")
    except ImportError as error:
        print("no %s without its module %s" % (version, error.name))' 2>/dev/null || true
}

# Python reads its variables before anything else. End with status 2 if it does not start with one.
# The launchers check PYTHONPATH themselves, and name the module that it hides.
check_python_variables() {
    local candidate name names
    candidate=$(command -v python3 || command -v python) || return 0
    ! PYTHONPATH='' "$candidate" -c "" 2>/dev/null && "$candidate" -E -c "" 2>/dev/null || return 0
    names=$(compgen -A export PYTHON | grep -vx PYTHONPATH)
    for name in $names; do
        (
            for other in $names; do
                [ "$other" = "$name" ] || unset "$other"
            done
            PYTHONPATH='' "$candidate" -c "" 2>/dev/null
        ) || {
            log "setup_env.sh: $name=${!name}: Python does not start with this value: unset $name"
            exit 2
        }
    done
}

# Set python to a suitable Python, that of the best tested version first. If there is none, python
# is empty and rejected has a list of the others.
# shellcheck disable=SC2034  # setup_env.sh uses python
find_python() {
    local candidate answer
    python="" rejected=""
    for candidate in python3.11 python3.10 python3.9 python3.12 python3 \
        "$standalone"/cpython-3.11.*/bin/python3.11; do
        answer=$(examine_python "$candidate")
        case $answer in
            yes)
                python=$(command -v "$candidate")
                return
                ;;
            "no "*)
                answer=${answer#no }
                case ", $rejected, " in
                    *", $answer, "*) ;;
                    *) rejected=${rejected:+$rejected, }$answer ;;
                esac
                ;;
        esac
    done
}

# Print why a Python must be fetched.
python_is_missing() { echo "$pythons is needed, and this machine has ${rejected:-none}"; }

# Print what else can be done.
ways_to_a_python() {
    local package="python3 python3-venv on Debian 12, Ubuntu 22.04 and 24.04"
    case $rejected in
        *"without its module ensurepip"*) package=python3-venv ;;
    esac
    echo "install $pythons and its venv module (apt-get install $package), or set" \
        "UV_PYTHON_INSTALL_MIRROR to a copy of $releases, or use the image of Dockerfile.cpu"
}

# Print the path of uv: the one on PATH, or one from the package index in a folder of its own, for
# which a Python of any version will do.
find_uv() {
    local candidate folder=$venv/uv
    ! command -v uv || return 0
    if "$folder/bin/uv" --version >/dev/null 2>&1; then # from a call that failed later
        echo "$folder/bin/uv"
        return
    fi
    for candidate in python3 python; do
        rm -rf "$folder"
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            "$candidate" -m venv "$folder" >&2 || return
            candidate=$folder/bin/python
        elif "$candidate" -c 'import pip' 2>/dev/null; then
            set -- --target "$folder"
        else
            continue
        fi
        "$candidate" -m pip --disable-pip-version-check --no-input install --progress-bar off \
            --require-hashes --only-binary :all: --no-deps "$@" \
            -r "$here/requirements/uv.txt" >&2 &&
            echo "$folder/bin/uv"
        return
    done
    echo "there is neither uv nor a Python with pip that could install it" >&2
    return 1
}

# Install Python 3.11 in .venv/python. uv changes nothing outside .venv.
fetch_python() {
    local uv
    uv=$(find_uv) || return
    export UV_PYTHON_INSTALL_DIR=$standalone UV_CACHE_DIR=$venv/uv-cache
    export UV_PYTHON_INSTALL_BIN=0 UV_NO_PROGRESS=1
    exec "$uv" python install 3.11
}

# Whether pip is told to use no package index.
uses_no_index() {
    case ${PIP_NO_INDEX-} in
        1 | [yY]* | [tT]* | [oO][nN]) true ;;
        *) false ;;
    esac
}

# Print the cause that the output of a failed command shows, or nothing.
explain_failure() {
    local name
    if grep -q "DO NOT MATCH THE HASHES" "$1"; then
        # "    demo==1.0 from https://... (from -r ...):"
        name=$(sed -n 's/^  *\([^ ]*==[^ ]* from [^ ]*\) (from -r.*/\1/p' "$1" | tail -n 1)
        echo "packages DO NOT MATCH THE HASHES in requirements/: ${name:-see the output}" \
            "was changed or damaged on its way, for example by a mirror or in PIP_FIND_LINKS"
    elif grep -qiE "certificate.?verify.?failed|UnknownIssuer|invalid peer certificate" "$1"; then
        echo "the server's certificate is not trusted: behind a proxy with a certificate of its" \
            "own, set SSL_CERT_FILE to a file that contains it"
    elif grep -q "Could not find a suitable TLS CA certificate bundle" "$1"; then
        grep -oE "Could not find a suitable TLS CA certificate bundle.*" "$1" | head -n 1
    elif grep -qiE "no space left on device|disk quota exceeded" "$1"; then
        echo "the disk is full: ${size:-1.7 GB} are needed in $venv and 1 GB in ${TMPDIR:-/tmp}"
    elif uses_no_index && grep -q "No matching distribution found for" "$1"; then
        name=$(sed -n 's/.*No matching distribution found for \([^ ]*\).*/\1/p' "$1" | tail -n 1)
        echo "PIP_NO_INDEX is set, and PIP_FIND_LINKS=${PIP_FIND_LINKS-} has no file of $name for" \
            "this Python: docs/setup.md shows how to fill that folder"
    elif grep -qE "from versions: none|ReadTimeoutError|IncompleteRead" "$1"; then
        echo "the package index cannot be reached: set https_proxy to a proxy or PIP_INDEX_URL to" \
            "a mirror, or install from a folder of packages (docs/setup.md)"
    fi
}

# Print what to do after fetch_python failed with this output.
explain_missing_python() {
    local cause
    cause=$(explain_failure "$1")
    [ -n "$cause" ] || cause=$(sed -n '$ { s/^ *cause: //; p; }' "$1")
    echo "uv could not download Python 3.11 ($cause; output: $1): $(ways_to_a_python)"
}

# Ignore settings of the caller that make Python use other modules, or pip another folder.
ignore_redirections() {
    unset PYTHONHOME PYTHONPATH PYTHONUSERBASE PIP_TARGET PIP_PREFIX PIP_ROOT
    export PIP_USER=0
}

# Let pip and uv trust the same certificates: those that the variables of either name, or else
# pip's settings, or else those of the system. For pip, a variable comes before its files.
share_certificates() {
    local file=${PIP_CERT:-${REQUESTS_CA_BUNDLE:-${CURL_CA_BUNDLE:-${SSL_CERT_FILE-}}}} system
    for system in "${PIP_CONFIG_FILE-}" ~/.config/pip/pip.conf ~/.pip/pip.conf /etc/pip.conf; do
        [ -n "$file" ] || [ ! -f "$system" ] ||
            file=$(sed -nE 's/^cert *[=:] *//p' "$system" | tail -n 1)
    done
    for system in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
        [ -n "$file" ] || [ ! -s "$system" ] || file=$system
    done
    if [ -n "$file" ]; then
        export REQUESTS_CA_BUNDLE=${REQUESTS_CA_BUNDLE:-$file} SSL_CERT_FILE=${SSL_CERT_FILE:-$file}
    fi
}
