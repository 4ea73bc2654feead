// Command containerd-shim-cri-dockerd-server is the shim server of a pod.
// containerd-shim-cri-dockerd-v1 starts it.
package main

import (
	"context"
	"syscall"

	"cri-dockerd/internal/shim/server"
)

// umask is the mask of file modes that processes of containers inherit, as under a login shell. An
// engine may start the shim with none.
const umask = 0o022

func main() {
	syscall.Umask(umask)
	server.Run(context.Background())
}
