#!/bin/sh
# Looks whether this machine and this kit are ready, then runs the kit's processes in the foreground
# until it is told to stop. With --anyway it starts them all the same. $SAMARITAN names the program
# where it is not on the path.
set -eu
kit=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
samaritan=${SAMARITAN:-samaritan}
if [ "${1:-}" = --anyway ]; then
    shift
elif ! "$samaritan" doctor --kit "$kit"; then
    echo "not started; mend what is missing, or run $0 --anyway" >&2
    exit 1
fi
exec "$samaritan" site start "$kit" "$@"
