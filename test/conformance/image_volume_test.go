package conformance

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/registry"
)

// volumeImage pulls an image with the given number of layers and returns its ID. The last layer has
// links into and out of the image.
func (n *node) volumeImage(t *testing.T, layers int) string {
	t.Helper()
	files := []map[string]string{{
		"base":       "from the base",
		"covered":    "old",
		"dir/file":   "in dir",
		"dir/deep/x": "deep",
		"bin/run":    "#!/bin/sh\n",
	}}

	for i := 1; i < layers; i++ {
		files = append(files, map[string]string{fmt.Sprint("layer", i): "x", "covered": fmt.Sprint("new ", i)})
	}

	files[len(files)-1]["inside"] = "-> dir/deep" // Engine 29 refuses absolute links
	files[len(files)-1]["outside"] = "-> ../../../../../../etc"
	repository := "volume-" + strings.ToLower(strings.NewReplacer("/", "-", ".", "-").Replace(t.Name()))
	id, err := n.pull(t.Context(), n.registry(t).Put(t, repository, "1", registry.Files(t, files...)), nil)
	if err != nil {
		t.Fatal(err)
	}

	return id
}

// withImage returns the configuration of a container that mounts an image at /volume.
func (n *node) withImage(name, image, subPath string) *runtimeapi.ContainerConfig {
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Metadata.Name = name
	cc.Mounts = []*runtimeapi.Mount{{
		ContainerPath: "/volume",
		Readonly:      true,
		Image:         &runtimeapi.ImageSpec{Image: image},
		ImageSubPath:  subPath,
	}}

	return cc
}

// imageMounts returns the image mounts and holder containers of the daemon. There are none if the
// engine mounts images itself.
func (n *node) imageMounts(t *testing.T) []string {
	t.Helper()
	mounts, err := os.ReadFile(n.own(t).Path("/proc/1/mountinfo"))
	if err != nil {
		t.Fatal(err)
	}

	var out []string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.Contains(f[4], "/image-volumes/") {
			out = append(out, f[4])
		}
	}

	return append(out, strings.Fields(n.docker(t, "ps", "-aq", "--filter", "name=cri-dockerd_image-volume_"))...)
}

// TestImageVolume mounts images with different numbers of layers and sub-paths.
func TestImageVolume(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		for _, layers := range []int{1, 2, 60} {
			t.Run(fmt.Sprint(layers, " layers"), func(t *testing.T) {
				id := n.volumeImage(t, layers)
				covered := "old"
				if layers > 1 {
					covered = fmt.Sprint("new ", layers-1)
				}

				for sub, want := range map[string]string{
					"":       "cat /volume/base /volume/covered /volume/dir/file|from the base" + covered + "in dir",
					"dir":    "cat /volume/file; ls /volume|in dirdeep\nfile\n",
					"inside": "cat /volume/x|deep",
				} {
					t.Run(fmt.Sprintf("sub-path %q", sub), func(t *testing.T) {
						cc := n.withImage(fmt.Sprintf("c%d-%d", layers, len(sub)), id, sub)
						c := n.startConfig(t, sandbox, pod, cc)
						command, output, _ := strings.Cut(want, "|")
						if got := n.exec(t, c, "sh", "-c", command); got != output {
							t.Errorf("content %q, want %q", got, output)
						}

						got := n.exec(t, c, "sh", "-c",
							"touch /volume/new 2>&1 || mount | grep -c ' /volume .*[(,]ro[,)]'")
						if !strings.HasSuffix(got, "\n1\n") {
							t.Errorf("the volume is writable: %s", got)
						}

						m := n.containerStatus(t, c).Mounts
						if len(m) != 1 || m[0].Image.GetImage() != id || m[0].ImageSubPath != sub || !m[0].Readonly ||
							m[0].ContainerPath != "/volume" {
							t.Errorf("ContainerStatus: %v", m)
						}
					})
				}
			})
		}

		for name, cc := range map[string]*runtimeapi.ContainerConfig{
			"missing sub-path":          n.withImage("bad1", n.volumeImage(t, 2), "missing"),
			"sub-path out of the image": n.withImage("bad2", n.volumeImage(t, 3), "outside/passwd"),
			"missing image":             n.withImage("bad3", "no/such/image:1", ""),
			"sub-path with ..":          n.withImage("bad4", n.volumeImage(t, 2), "dir/../../x"),
			"missing image ID":          n.withImage("bad5", "sha256:"+strings.Repeat("0", 64), ""),
			"sub-path below a file":     n.withImage("bad6", n.volumeImage(t, 2), "base/x"),
		} {
			t.Run(name, func(t *testing.T) {
				r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
					PodSandboxId:  sandbox,
					Config:        cc,
					SandboxConfig: pod,
				})
				if err == nil { // the engine may report the error at the start
					_, err = n.Runtime.StartContainer(t.Context(),
						&runtimeapi.StartContainerRequest{ContainerId: r.ContainerId})
				}

				if err == nil {
					t.Error("CreateContainer and StartContainer succeeded")
				}
			})
		}

		n.removePod(t, sandbox)
		if mounts := n.imageMounts(t); len(mounts) > 0 {
			t.Errorf("mounts and holders remain: %v", mounts)
		}
	})
}

// TestImageVolumeIsShared shares an image among pods. Kills, removals and a prune with docker do
// not affect the remaining users, and leave no unused mount.
func TestImageVolumeIsShared(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		id := n.volumeImage(t, 2)
		var pods []*runtimeapi.PodSandboxConfig
		var sandboxes, users []string
		for range 3 {
			cfg := n.podConfig(t)
			pods = append(pods, cfg)
			sandboxes = append(sandboxes, n.runPod(t, cfg))
			users = append(users, n.startConfig(t, sandboxes[len(sandboxes)-1], cfg, n.withImage("user", id, "")))
		}

		reads := func(c string) {
			t.Helper()
			if got := n.exec(t, c, "cat", "/volume/covered"); got != "new 1" {
				t.Errorf("content of the volume: %q", got)
			}
		}

		native := n.hasContainerdStore(t)
		if got := n.imageMounts(t); !native && len(got) != 2 || native && len(got) != 0 {
			t.Errorf("mounts and holders: %v", got)
		}
		if err := n.removeImage(t, id); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("RemoveImage of a volume: %v, want FailedPrecondition", err)
		}

		n.Kill(t)
		n.Restart(t)
		n.removePod(t, sandboxes[0])
		reads(users[1])
		n.docker(t, "container", "prune", "-f") // removes the holder
		reads(users[2])
		n.docker(t, "rm", "-f", users[1])
		n.Kill(t)
		n.Restart(t)
		reads(users[2])
		if !native {
			eventually(t, "new holder", func() bool { return len(n.imageMounts(t)) == 2 })
		}

		extra := n.startConfig(t, sandboxes[1], pods[1], n.withImage("extra", id, "dir"))
		if got := n.exec(t, extra, "cat", "/volume/file"); got != "in dir" {
			t.Errorf("content of the sub-path: %q", got)
		}

		n.docker(t, "rm", "-f", extra)
		n.removePod(t, sandboxes[1])
		reads(users[2])
		n.Kill(t)
		n.docker(t, "rm", "-f", users[2]) // while the daemon is stopped
		n.Restart(t)
		eventually(t, "release of the volume", func() bool { return len(n.imageMounts(t)) == 0 })
		n.removePod(t, sandboxes[2])
		if err := n.removeImage(t, id); err != nil {
			t.Error(err)
		}
	})
}
