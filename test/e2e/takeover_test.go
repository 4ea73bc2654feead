package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/test/engines"
)

// TestKubeletTakeover replaces a pod's containers by those of an older shim while kubelet and
// daemon are stopped. The restarted kubelet accepts the pod and restarts nothing.
func TestKubeletTakeover(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v, "--network-plugin=", "--pod-cidr=", "--container-log=json-file")
			k.run(t, k.config)
			k.apply(t, "web", webPod)
			k.waitRunning(t, "web")
			k.engine.KillBackground(t, "kubelet")
			k.daemon.Kill(t)
			ids := recreateAsOlderShim(t, k)
			before := processes(t, k)
			k.daemon.Restart(t)
			k.run(t, k.config)
			k.waitRunning(t, "web")
			k.apply(t, "crash", crashPod) // the kubelet syncs web at least until crash has a log
			logs(t, k)
			p := k.waitRunning(t, "web")
			for _, c := range p.Status.ContainerStatuses {
				if !ids[strings.TrimPrefix(c.ContainerID, "docker://")] || c.RestartCount != 0 {
					t.Errorf("not adopted: %+v", c)
				}
			}

			if now := processes(t, k); now != before {
				t.Errorf("processes before:\n%s\nnow:\n%s", before, now)
			}

			pages(t, k)
			for _, name := range []string{"web", "crash"} {
				if err := os.Remove(filepath.Join(k.manifests, name+".yaml")); err != nil {
					t.Fatal(err)
				}
			}

			eventually(t, "the adopted pod is removed", func() error {
				if remaining := webContainers(t, k); len(remaining) > 0 {
					return fmt.Errorf("%d containers remain", len(remaining))
				}
				return nil
			})
		})
	}
}

// webContainers returns the containers of the pod web, the sandbox first.
func webContainers(t *testing.T, k *kubelet) []container.InspectResponse {
	t.Helper()
	docker := k.engine.Docker(t)
	list, err := docker.ContainerList(t.Context(),
		client.ContainerListOptions{All: true, Filters: make(client.Filters).Add("name", "_web-node_")})
	if err != nil {
		t.Fatal(err)
	}

	var out []container.InspectResponse
	for _, item := range list.Items {
		r, err := docker.ContainerInspect(t.Context(), item.ID, client.ContainerInspectOptions{})
		if errdefs.IsNotFound(err) {
			continue // removed concurrently
		} else if err != nil {
			t.Fatal(err)
		}

		if strings.HasPrefix(r.Container.Name, "/k8s_POD_") {
			out = append([]container.InspectResponse{r.Container}, out...)
		} else {
			out = append(out, r.Container)
		}
	}

	return out
}

// processes returns the PIDs and start times of the pod web.
func processes(t *testing.T, k *kubelet) string {
	t.Helper()
	var s string
	for _, c := range webContainers(t, k) {
		s += fmt.Sprintln(c.Name, c.ID, c.State.Pid, c.State.StartedAt)
	}
	return s
}

// recreateAsOlderShim recreates the containers of the pod web in the format of an older shim, and
// returns their IDs.
func recreateAsOlderShim(t *testing.T, k *kubelet) map[string]bool {
	t.Helper()
	docker, ids, sandbox := k.engine.Docker(t), map[string]bool{}, ""
	for _, old := range webContainers(t, k) {
		_, err := docker.ContainerRemove(t.Context(), old.ID, client.ContainerRemoveOptions{Force: true})
		if err != nil {
			t.Fatal(err)
		}

		for label := range old.Config.Labels {
			if strings.HasPrefix(label, "io.cri-dockerd.") {
				delete(old.Config.Labels, label)
			}
		}

		old.HostConfig.Annotations = nil
		if sandbox != "" {
			old.Config.Labels["io.kubernetes.sandbox.id"] = sandbox
			old.Config.Hostname, old.Config.ExposedPorts = "", nil
			old.HostConfig.NetworkMode, old.HostConfig.IpcMode = container.NetworkMode("container:"+sandbox),
				container.IpcMode("container:"+sandbox)
		}

		r, err := docker.ContainerCreate(t.Context(), client.ContainerCreateOptions{
			Name:       strings.TrimPrefix(old.Name, "/"),
			Config:     old.Config,
			HostConfig: old.HostConfig,
		})
		if err == nil {
			_, err = docker.ContainerStart(t.Context(), r.ID, client.ContainerStartOptions{})
		}

		if err != nil {
			t.Fatalf("%s: %v", old.Name, err)
		}

		if sandbox == "" {
			sandbox = r.ID
			continue
		}

		ids[r.ID] = true
		link(t, k, docker, r.ID, old.Config.Labels["io.kubernetes.container.logpath"])
		if !old.State.Running { // the init container
			eventually(t, "the init container has exited", func() error {
				in, err := docker.ContainerInspect(t.Context(), r.ID, client.ContainerInspectOptions{})
				if err == nil && in.Container.State.Running {
					err = errors.New("the container is running")
				}
				return err
			})
		}
	}

	return ids
}

// link creates the kubelet's link to a container's log.
func link(t *testing.T, k *kubelet, docker *client.Client, id, path string) {
	t.Helper()
	in, err := docker.ContainerInspect(t.Context(), id, client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}

	if out, err := k.engine.Command("ln", "-sfn", in.Container.LogPath, path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
