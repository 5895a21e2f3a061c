#!/bin/sh
# vLLM's data parallelism over two machines of eight GPUs each: 16 engines behind one address, which is the first machine's.
#
# Each machine needs the same environment (vLLM, weft), and mixture and base at the same paths. On one machine alone,
# --data-parallel-size 8 is all.
#
#   examples/serve/data_parallel.sh /shared/my-mixture FIRST_MACHINE 0 --api-key secret     on the first
#   examples/serve/data_parallel.sh /shared/my-mixture FIRST_MACHINE 8                      on the second
mixture=$1 first=$2 rank=$3
shift 3
set -- --data-parallel-size 16 --data-parallel-size-local 8 --data-parallel-address "$first" \
    --data-parallel-rpc-port 13345 "$@"
if [ "$rank" -eq 0 ]; then
    exec weft serve "$mixture" --host 0.0.0.0 "$@"
fi
exec weft serve "$mixture" --headless --data-parallel-start-rank "$rank" "$@"
