#!/usr/bin/env bash
# The specs that differ from a commit, each once, ended by NUL: those that were changed or added since HEAD left it, and those
# whose lock file was.
#
#   changed.sh BASE PATHSPEC
set -euo pipefail

base="$1" pathspec="$2"
while IFS= read -r -d '' file; do
  case "$file" in
    *.lock.yaml)
      # A lock says which spec it is of.
      spec="$(dirname "$file")/$(sed -n 's/^spec: *//p' "$file" | head -n 1)"
      if [ -f "$spec" ]; then printf '%s\0' "${spec#./}"; fi
      ;;
    *) printf '%s\0' "$file" ;;
  esac
done < <(git diff --name-only --diff-filter=d -z "$base...HEAD" -- "$pathspec") | sort --zero-terminated --unique
