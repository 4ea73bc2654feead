package e2e

import (
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

// TestKubeletTakeover puts containers of an older shim in the place of a pod's while nobody looks:
// the kubelet that comes back finds the pod as it wants it, and restarts nothing.
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
			ids := asOlderShim(t, k)
			before := processes(t, k)
			k.daemon.Restart(t)
			k.run(t, k.config)
			k.waitRunning(t, "web")
			k.apply(t, "crash", crashPod) // until its log is there, the kubelet looks at web, too
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

			eventually(t, "the adopted pod is gone", func() error {
				if left := ofWeb(t, k); len(left) > 0 {
					return fmt.Errorf("%d containers are left", len(left))
				}
				return nil
			})
		})
	}
}

// ofWeb are the containers of the pod web, the sandbox first.
func ofWeb(t *testing.T, k *kubelet) []container.InspectResponse {
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
			continue // it has gone meanwhile
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

// processes are the PIDs of the pod web and when they started.
func processes(t *testing.T, k *kubelet) string {
	t.Helper()
	var s string
	for _, c := range ofWeb(t, k) {
		s += fmt.Sprintln(c.Name, c.ID, c.State.Pid, c.State.StartedAt)
	}
	return s
}

// asOlderShim makes the containers of the pod web anew as a shim before this one makes them, and
// returns their IDs.
func asOlderShim(t *testing.T, k *kubelet) map[string]bool {
	t.Helper()
	docker, ids, sandbox := k.engine.Docker(t), map[string]bool{}, ""
	for _, old := range ofWeb(t, k) {
		if _, err := docker.ContainerRemove(t.Context(), old.ID, client.ContainerRemoveOptions{Force: true}); err !=
			nil {
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
			eventually(t, "it has ended again", func() error {
				if in, err := docker.ContainerInspect(t.Context(), r.ID, client.ContainerInspectOptions{}); err !=
					nil || in.Container.State.Running {
					return fmt.Errorf("%v", err)
				}
				return nil
			})
		}
	}

	return ids
}

// link makes a container's log visible where the kubelet looks for it.
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
