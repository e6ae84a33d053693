#!/bin/sh
# A validator as a cron job, where no service should run all day:
#
#   */10 * * * *  flock -n /srv/inbox/.lock sh validator_cron.sh /srv/inbox /srv/pins.toml /srv/ledger.sqlite3
#
# FOLDER/expected.tsv has a line for every proof that is wanted: name, block hash and public key, separated by tabs. It is
# written by what follows the chain, never by a node. FOLDER/NAME.jsonl is judged once and moved to FOLDER/honest, fraud
# or unsure; what stood in the way is beside it, in NAME.json and NAME.log. The ledger decides on whole lives.
set -eu
folder=$1 pins=$2 ledger=$3
model=${ASSAY_MODEL:-reference:qwen3}
mkdir -p "$folder/honest" "$folder/fraud" "$folder/unsure"
tab=$(printf '\t')
while IFS=$tab read -r name block key || [ -n "$name" ]; do  # the last line may lack its end
    proof=$folder/$name.jsonl
    [ -f "$proof" ] || continue
    code=0
    assay poc verify "$proof" --model "$model" --pins "$pins" --block-hash "$block" --public-key "$key" \
        --ledger "$ledger" --json >"$folder/$name.json" 2>"$folder/$name.log" </dev/null || code=$?
    case $code in
        0) kind=honest ;;
        1) kind=fraud ;;
        2) kind=unsure ;;
        *)  # no verdict: cron may have no assay on its PATH; the next run judges it
            echo "$name was not judged, exit code $code: $folder/$name.log" >&2
            continue
            ;;
    esac
    mv "$proof" "$folder/$name.json" "$folder/$name.log" "$folder/$kind/"
    echo "$name $kind"
done <"$folder/expected.tsv"
