#!/usr/bin/env bash
# Writes the report as a comment on the pull request, or over the one that an earlier run wrote.
#
#   REPORT              the file
#   CHANGED             how many specs differ; with 0 only an earlier comment is written over
#   PULL_REQUEST        its number
#   GITHUB_REPOSITORY   owner/name
#   GH_TOKEN            for `gh`
#
# A pull request from a fork may not write comments: that is a warning, the report is in the job's summary.
set -euo pipefail

# What GitHub takes in one comment is 65,536 characters; the end of a longer report is left to the summary.
limit=60000
marker='<!-- minitron specs -->'
[ -s "${REPORT:-}" ] || { echo "There is no report."; exit 0; }

body="$REPORT.comment"
head -c "$limit" "$REPORT" | iconv -c -f UTF-8 -t UTF-8 > "$body"
if [ "$(wc -c < "$REPORT")" -gt "$limit" ]; then
  printf '\n~~~~~~\n</details>\n\nThe report is longer than a comment can be: the rest is in the summary of the job.\n' >> "$body"
fi

comments="repos/$GITHUB_REPOSITORY/issues/$PULL_REQUEST/comments"
if ! earlier="$(gh api --paginate "$comments" --jq ".[] | select(.body | startswith(\"$marker\")) | .id")"; then
  echo "::warning::The comments of the pull request cannot be read; the report is in the summary of the job."
  exit 0
fi
earlier="$(printf '%s\n' "$earlier" | head -n 1)"
if [ -n "$earlier" ] && gh api --silent --method PATCH "repos/$GITHUB_REPOSITORY/issues/comments/$earlier" -F "body=@$body"; then
  exit 0
fi
if [ "${CHANGED:-1}" = 0 ]; then exit 0; fi
gh api --silent --method POST "$comments" -F "body=@$body" ||
  echo "::warning::The report cannot be written as a comment (a pull request from a fork?); it is in the summary of the job."
