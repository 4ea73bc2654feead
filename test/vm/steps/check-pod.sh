# cri-dockerd check --pod passes and leaves nothing.
. ./lib.sh

before=$(docker ps -aq | wc -l)
cri-dockerd check --timeout 60s --pod
[ "$(docker ps -aq | wc -l)" = "$before" ] || fail "containers remain: $(docker ps -a)"
