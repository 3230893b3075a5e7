#!/usr/bin/env bash
# The specs that come to something else than at a commit, each once, ended by NUL: those that were changed or added since HEAD
# left it, those whose lock file was, and those that build on one of these (`extends`, `teacher.spec`).
#
#   changed.sh BASE PATHSPEC
set -euo pipefail

base="$1" pathspec="$2"
declare -A changed=()

while IFS= read -r -d '' file; do
  case "$file" in
    *.lock.yaml)
      # A lock says which spec it is of.
      spec="$(dirname "$file")/$(sed -n 's/^spec: *//p' "$file" | head -n 1)"
      if [ -f "$spec" ]; then changed["${spec#./}"]=1; fi
      ;;
    *) changed["$file"]=1 ;;
  esac
done < <(git diff --name-only --diff-filter=d -z "$base...HEAD" -- "$pathspec")

mapfile -d '' -t specs < <(git ls-files -z -- "$pathspec")
before=-1
while [ "${#changed[@]}" != "$before" ]; do
  before="${#changed[@]}"
  for spec in "${specs[@]}"; do
    if [ -n "${changed["$spec"]:-}" ] || [ ! -f "$spec" ]; then continue; fi
    while IFS= read -r below; do
      file="$(realpath --canonicalize-missing --relative-to=. "$(dirname "$spec")/$below")"
      if [ -n "${changed["$file"]:-}" ]; then changed["$spec"]=1; fi
    done < <(sed -nE "s/^(extends|teacher: *\{ *spec|[ ]+spec): *[\"']?([^\"',}#]*[^\"',}# ]).*/\2/p" "$spec")
  done
done

if [ "${#changed[@]}" != 0 ]; then printf '%s\0' "${!changed[@]}" | sort --zero-terminated; fi
