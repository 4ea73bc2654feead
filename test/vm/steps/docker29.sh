#!/bin/bash
# Makes Docker 29 the engine of the units, with a containerd that has the data directory $1. The caller restarts the
# units.
set -eu
. ./lib.sh

path=$root/docker29:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /etc/systemd/system/{docker,containerd}.service.d
cat > /etc/systemd/system/docker.service.d/vm.conf <<END
[Service]
Environment=PATH=$path
ExecStart=
ExecStart=$root/docker29/dockerd -H fd:// --containerd=/run/containerd/containerd.sock
END
cat > /etc/systemd/system/containerd.service.d/vm.conf <<END
[Service]
Environment=PATH=$path
ExecStart=
ExecStart=$root/docker29/containerd --config /etc/containerd29.toml
END
cat > /etc/containerd29.toml <<END
version = 3
root = "$1"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"]
END
