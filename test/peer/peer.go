// Package peer runs containerd with its CRI plugins beside the engine of a test, for comparisons.
package peer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/test/engines"
	"cri-dockerd/test/registry"
)

// config configures containerd with its CRI plugins. Arguments: directory, image of the pause,
// OCI runtime, directories of the CNI plugins in TOML.
const config = `version = 3
root = "%[1]s/root"
state = "%[1]s/state"
[grpc]
  address = "%[1]s/sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "%[2]s"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  disable_hugetlb_controller = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = [%[4]s]
  conf_dir = "%[1]s/net.d"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = "%[3]s"
[plugins.'io.containerd.grpc.v1.cri']
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  disable_tcp_service = true
`

// network is the network of the peer's pods.
const network = `{"cniVersion": "1.0.0", "name": "peer", "plugins": [{
	"type": "bridge", "bridge": "peer0", "isGateway": true,
	"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.99.0.0/24"}]]}}]}`

// Peer is a running containerd.
type Peer struct {
	Runtime runtimeapi.RuntimeServiceClient
	Busybox string // image
	Socket  string // of the CRI
}

// Start starts containerd with its CRI in the engine's namespaces. It ends with the engine. The
// containerd is always that of the Docker 29 build.
func Start(ctx context.Context, tb engines.TB, e *engines.Engine) *Peer {
	tb.Helper()
	bin := filepath.Join(engines.Cache(), "docker-29")
	dir := filepath.Join(e.Dir, "peer")
	if _, err := os.Stat(filepath.Join(bin, "containerd")); err != nil {
		tb.Fatalf("peer: containerd is not built; run hack/docker29.sh: %v", err)
	}

	if err := os.MkdirAll(filepath.Join(dir, "net.d"), 0o755); err != nil {
		tb.Fatalf("peer: %v", err)
	}

	wrapper := filepath.Join(dir, "runc")
	engines.Build(tb, wrapper, "cri-dockerd/test/engines/helper", "-X main.runc="+filepath.Join(bin, "runc"), false)
	images := push(ctx, tb, e)
	var plugins []string
	for _, d := range PluginDirs() {
		plugins = append(plugins, fmt.Sprintf("%q", d))
	}

	for file, content := range map[string]string{
		"config.toml":         fmt.Sprintf(config, dir, images.pause, wrapper, strings.Join(plugins, ", ")),
		"net.d/peer.conflist": fmt.Sprintf(network, filepath.Join(dir, "leases")),
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
			tb.Fatalf("peer: %v", err)
		}
	}

	path := bin + ":" + filepath.Join(engines.Cache(), "criu") + ":/usr/sbin:/usr/bin:/sbin:/bin"
	e.Background(tb, "peer", "env", "PATH="+path,
		filepath.Join(bin, "containerd"), "--config", filepath.Join(dir, "config.toml"))
	clients := engines.Connect(tb, "unix://"+filepath.Join(dir, "sock"))
	var err error
	ready := func() bool {
		callCtx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = clients.Runtime.Status(callCtx, &runtimeapi.StatusRequest{})
		return err == nil
	}
	if !engines.Within(time.Minute, ready) {
		tb.Fatalf("peer: containerd does not respond: %v; see %s", err, filepath.Join(e.Dir, "peer.log"))
	}

	if _, err := clients.Image.PullImage(ctx,
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: images.busybox}}); err != nil {
		tb.Fatalf("peer: containerd: %v", err)
	}

	return &Peer{clients.Runtime, images.busybox, filepath.Join(dir, "sock")}
}

// images are the names of the peer's images.
type images struct{ pause, busybox string }

// push pushes the daemon's pause image and the engine's busybox to a registry for containerd.
func push(ctx context.Context, tb engines.TB, e *engines.Engine) images {
	tb.Helper()
	store := registry.Serve(tb, e.Listen(tb, "127.0.0.1:0"))
	put := func(name string, archive []byte) string {
		image, err := tarball.Image(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(archive)), nil
		}, nil)
		if err != nil {
			tb.Fatalf("peer: image %s: %v", name, err)
		}
		return store.Put(tb, name, "peer", image)
	}

	embedded, err := pause.New("amd64")
	if err != nil {
		tb.Fatalf("peer: %v", err)
	}

	saved, err := e.Docker(tb).ImageSave(ctx, []string{engines.Busybox}, client.ImageSaveWithPlatforms())
	if err != nil {
		tb.Fatalf("peer: save %s: %v", engines.Busybox, err)
	}

	busybox, err := io.ReadAll(saved)
	if err = errors.Join(err, saved.Close()); err != nil {
		tb.Fatalf("peer: save %s: %v", engines.Busybox, err)
	}

	return images{pause: put("pause", embedded.Archive), busybox: put("busybox", busybox)}
}

// NetNS returns the path of a containerd pod's network namespace inside the engine's
// namespaces.
func NetNS(ctx context.Context, runtime runtimeapi.RuntimeServiceClient, pod string) (string, error) {
	r, err := runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		return "", err
	}

	var info struct {
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct{ Type, Path string }
			}
		}
	}

	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		return "", err
	}

	for _, ns := range info.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			return strings.Replace(ns.Path, "/var/run/", "/run/", 1), nil
		}
	}

	return "", fmt.Errorf("pod %s has no network namespace", pod)
}

// PluginDirs returns the default directories of plugins: the CNI convention, and Debian's
// package.
func PluginDirs() []string { return []string{"/opt/cni/bin", "/usr/lib/cni"} }
