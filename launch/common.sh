# shellcheck shell=bash
# shellcheck disable=SC2154  # `command`, `dry_run` and `overrides` are of the script
# What the scripts of this folder share: errors, quoting, dry runs, and the command line.
#
# A script defines before it sources this file:
#   PROGRAM        its name, for messages
#   VALUE_FLAGS    flags that take one value, kept in the variable of the same name (--run-dir in run_dir)
#   LIST_FLAGS     flags that may be repeated, kept in the array of the same name and an s (--ssh-arg in ssh_args)
#   SWITCHES       flags without a value, kept as 1 in the variable of the same name

usage_error() {
  printf '%s: %s (--help lists the flags)\n' "$PROGRAM" "$1" >&2
  exit 2
}

fail() {
  printf '%s: %s\n' "$PROGRAM" "$1" >&2
  exit 1
}

warn() { printf '%s: %s\n' "$PROGRAM" "$1" >&2; }

# Prints the comment at the top of the script.
print_help() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# Prints its arguments, quoted for bash, on one line; single quotes where they do, for the reader's sake.
quote() {
  local word line='' escaped="'\\''"
  for word in "$@"; do
    if [[ $word == *[[:cntrl:]]* ]]; then
      printf -v word '%q' "$word"
    elif [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'${word//\'/$escaped}'"
    fi
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

run_command() {
  if [[ -n $dry_run ]]; then quote "$@"; else "$@"; fi
}

# `set_flag FLAG VALUE`; eval, because the bash of macOS has no references to variables.
set_flag() {
  local variable=${1#--}
  variable=${variable//-/_}
  if [[ $LIST_FLAGS =~ [[:space:]]"$1"[[:space:]] ]]; then
    eval "${variable}s+=(\"\$2\")"
  else
    printf -v "$variable" '%s' "$2"
  fi
}

# Reads flags into their variables, and KEY=VALUE overrides into the array `overrides`.
parse() {
  local flag
  while (($#)); do
    flag=${1%%=*}
    if [[ $1 == --help ]]; then
      print_help && exit 0
    elif [[ $SWITCHES =~ [[:space:]]"$1"[[:space:]] ]]; then
      set_flag "$1" 1
    elif [[ $1 == -* && ! $VALUE_FLAGS$LIST_FLAGS =~ [[:space:]]"$flag"[[:space:]] ]]; then
      usage_error "unknown flag $flag"
    elif [[ $1 == -*=* ]]; then
      set_flag "$flag" "${1#*=}"
    elif [[ $1 == -* ]]; then
      if [[ $# -lt 2 || ($2 == --* && $VALUE_FLAGS =~ [[:space:]]"$flag"[[:space:]]) ]]; then
        usage_error "$flag must have a value"
      fi
      set_flag "$flag" "$2" && shift
    elif [[ $1 == *=* ]]; then
      overrides+=("$1")
    else
      usage_error "arguments must be flags or KEY=VALUE overrides; got '$1'"
    fi
    shift
  done
}

# `require NAME…`: each variable must have been given by its flag.
require() {
  local variable
  for variable in "$@"; do
    if [[ -z ${!variable} ]]; then usage_error "$command needs --${variable//_/-}"; fi
  done
}

# `require_numbers NAME…`: each variable that was given must be a positive whole number.
require_numbers() {
  local variable
  for variable in "$@"; do
    if [[ -n ${!variable} && ! ${!variable} =~ ^[1-9][0-9]*$ ]]; then
      usage_error "--${variable//_/-} must be a positive whole number; got '${!variable}'"
    fi
  done
}

# `check_stages STAGE…`: each must be SOURCE=TARGET.
check_stages() {
  local stage
  for stage in "$@"; do
    if [[ ! $stage =~ ^.+=.+$ ]]; then usage_error "--stage must be SOURCE=TARGET; got '$stage'"; fi
  done
}

# Tells training to be done within four fifths of the grace period after SIGTERM, unless the user says otherwise.
stop_in_time() {
  if [[ " ${overrides[*]}" != *" stop_s="* ]]; then overrides+=("stop_s=$((grace_s * 4 / 5))"); fi
}

# The name by which Google Cloud knows a slice: v5e is spelled v5litepod there.
cloud_name() { printf '%s\n' "${1/#v5e-/v5litepod-}"; }
