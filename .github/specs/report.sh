#!/usr/bin/env bash
# Validates the specs that differ from $BASE and writes a report of them in markdown.
#
#   BASE            commit that the changes are counted from
#   SPECS           git pathspec of the specs
#   PLAN            `true` to show plans and differences beside the validation
#   DEVICE          devices that plans are reckoned for; none where it is empty
#   GITHUB_OUTPUT   gets `report` (the file) and `changed` (how many specs)
#   GITHUB_STEP_SUMMARY, RUNNER_TEMP   as GitHub sets them
#
# Ends with 1 where a spec is wrong; the report is written in any case.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
temporary="${RUNNER_TEMP:-$(mktemp -d)}"
report="$temporary/minitron-report.md"
said="$temporary/minitron-said.txt"
base="$temporary/minitron-base"
failed=0

[ -n "${BASE:-}" ] || { echo "::error::There is no base to compare with: run on pull_request, or give \`base\`." >&2; exit 2; }
git cat-file -e "$BASE^{commit}" 2>/dev/null || {
  echo "::error::The base $BASE is not in this checkout: give actions/checkout \`fetch-depth: 0\`." >&2; exit 2; }

# Words of a process in a block that nothing in them can end or make a link of.
quoted() {
  printf '~~~~~~text\n'
  sed -e "s|$PWD/||g" -e "s|$base/|(before) |g" -e 's/^~~~/ ~~~/' "$1"
  printf '~~~~~~\n\n'
}

mapfile -d '' -t specs < <("$here/changed.sh" "$BASE" "$SPECS")
echo "<!-- minitron specs -->" > "$report"
{
  echo "report=$report"
  echo "changed=${#specs[@]}"
} >> "${GITHUB_OUTPUT:-/dev/null}"

if [ "${#specs[@]}" = 0 ]; then
  echo "No spec differs from the base." | tee -a "$report" "${GITHUB_STEP_SUMMARY:-/dev/null}"
  exit 0
fi

if minitron validate "${specs[@]}" > /dev/null 2> "$said"; then
  printf '**%s changed, all valid.**\n\n' "$([ "${#specs[@]}" = 1 ] && echo "1 spec" || echo "${#specs[@]} specs")" >> "$report"
else
  failed=1
  printf '**There are mistakes in the specs.**\n\n' >> "$report"
fi
if [ -s "$said" ]; then quoted "$said" >> "$report"; fi
cat "$said" >&2

if [ "${PLAN:-true}" = true ]; then
  git worktree add --quiet --detach "$base" "$BASE"
  trap 'git worktree remove --force "$base"' EXIT
  for spec in "${specs[@]}"; do
    name="$(printf '%s' "$spec" | tr -d '`<>\n')"
    # A spec that is wrong has been told of; there is nothing to plan.
    minitron validate "$spec" > /dev/null 2>&1 || continue
    printf '## `%s`\n\n' "$name" >> "$report"
    if [ -f "$base/$spec" ]; then
      printf '<details><summary>What changes</summary>\n\n' >> "$report"
      if minitron diff --markdown "$base/$spec" "$spec" > "$temporary/minitron-diff.md" 2> "$said"; then
        sed -e "s|$base/|(before) |g" "$temporary/minitron-diff.md" >> "$report"
      else
        printf 'Nothing to compare with: one of the two cannot be planned.\n\n' >> "$report"
        quoted "$said" >> "$report"
      fi
      printf '\n</details>\n\n' >> "$report"
    else
      printf 'A new spec.\n\n' >> "$report"
    fi
    printf '<details><summary>Plan</summary>\n\n' >> "$report"
    if minitron plan --markdown ${DEVICE:+--device "$DEVICE"} "$spec" > "$temporary/minitron-plan.md" 2> "$said"; then
      sed -e "s|$PWD/||g" "$temporary/minitron-plan.md" >> "$report"
      if [ -s "$said" ]; then quoted "$said" >> "$report"; fi
    else
      failed=1
      printf '**It cannot be compiled:**\n\n' >> "$report"
      quoted "$said" >> "$report"
      cat "$said" >&2
    fi
    printf '\n</details>\n\n' >> "$report"
  done
fi

cat "$report" >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
exit "$failed"
