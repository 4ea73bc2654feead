package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// volumesScript writes into the volumes of usersPod, and reports their contents and owners as seen
// inside.
const volumesScript = `{
	for dir in empty memory host dev/shm; do echo written > /$dir/file; done
	echo written > /single
	echo written > /dev/termination-log
	for file in /config/key /secret/key /projected/config /projected/secret /subpath; do
		echo "$(stat -Lc %u:%g $file) $(cat $file)"
	done
	stat -c %u:%g /empty /memory /empty/file /memory/file /host/file /single /etc/hosts /dev/termination-log
	cat /downward/labels
} > /tmp/report 2>&1
touch /tmp/ready
sleep 100000`

const volumesReport = `0:3000 value
0:3000 value
0:3000 value
0:3000 value
0:3000 value
0:3000
0:3000
0:3000
0:3000
0:0
0:0
0:0
0:0
app="users"`

// usersPod returns a pod with a user namespace and volumes of every kind that needs no driver.
// hosts is a directory of the node with a file named single.
func usersPod(hosts string) object {
	path := func(name, path string) object { return object{"name": name, "mountPath": path} }
	single := path("single", "/single")
	sub := path("config", "/subpath")
	sub["subPath"] = "key"
	ready := object{"exec": object{"command": []string{"test", "-e", "/tmp/ready"}}, "periodSeconds": 1}

	return podObject("users", object{
		"hostUsers":       false,
		"securityContext": object{"fsGroup": 3000},
		"volumes": []object{
			{"name": "empty", "emptyDir": object{}},
			{"name": "memory", "emptyDir": object{"medium": "Memory"}},
			{"name": "host", "hostPath": object{"path": hosts, "type": "Directory"}},
			{"name": "single", "hostPath": object{"path": filepath.Join(hosts, "single"), "type": "File"}},
			{"name": "config", "configMap": object{"name": "config", "defaultMode": fileMode}},
			{"name": "secret", "secret": object{"secretName": "secret", "defaultMode": fileMode}},
			{"name": "downward", "downwardAPI": object{"items": labelsFile, "defaultMode": fileMode}},
			{"name": "projected", "projected": object{"defaultMode": fileMode, "sources": []object{
				{"configMap": object{"name": "config", "items": []object{{"key": "key", "path": "config"}}}},
				{"secret": object{"name": "secret", "items": []object{{"key": "key", "path": "secret"}}}},
				{"downwardAPI": object{"items": labelsFile}},
			}}},
		},
		"containers": []object{{
			"name":            "main",
			"image":           engines.Busybox,
			"imagePullPolicy": "Never",
			"command":         []string{"sh", "-c", volumesScript},
			"readinessProbe":  ready,
			"volumeMounts": []object{
				path("empty", "/empty"),
				path("memory", "/memory"),
				path("host", "/host"),
				single,
				path("config", "/config"),
				path("secret", "/secret"),
				path("downward", "/downward"),
				path("projected", "/projected"),
				sub,
			},
		}},
	})
}

// fileMode is the API server's default mode of files.
const fileMode = 0o644

var labelsFile = []object{{
	"path":     "labels",
	"fieldRef": object{"apiVersion": "v1", "fieldPath": "metadata.labels"},
}}

// podObject returns a pod of the node.
func podObject(name string, spec object) object {
	maps.Copy(spec, object{
		"nodeName":                      "node",
		"restartPolicy":                 "Never",
		"terminationGracePeriodSeconds": 1,
		"automountServiceAccountToken":  false,
		"enableServiceLinks":            false,
	})

	return object{
		"kind":       "Pod",
		"apiVersion": "v1",
		"metadata": object{
			"name":            name,
			"namespace":       "default",
			"uid":             name,
			"resourceVersion": "1",
			"labels":          object{"app": name},
		},
		"spec":   spec,
		"status": object{"phase": "Pending"},
	}
}

// groupsPod returns a pod whose user is in a group of the image.
func groupsPod(name, policy string) object {
	return podObject(name, object{
		"hostUsers": false,
		"securityContext": object{
			"runAsUser":                1000,
			"runAsGroup":               1000,
			"supplementalGroups":       []int{4000},
			"supplementalGroupsPolicy": policy,
		},
		"containers": []object{{
			"name":            "main",
			"image":           engines.Busybox,
			"imagePullPolicy": "Never",
			"command":         []string{"sleep", "100000"},
		}},
	})
}

// usersObjects returns the objects of TestKubeletUserNamespaces.
func usersObjects(hosts string) map[string][]object {
	meta := func(name string) object {
		return object{"name": name, "namespace": "default", "resourceVersion": "1"}
	}
	objects := secretObjects("registry.invalid", "")
	objects["/api/v1/namespaces/default/pods"] = []object{
		usersPod(hosts), groupsPod("strict", "Strict"), groupsPod("merge", "Merge"),
	}
	objects["/api/v1/namespaces/default/configmaps"] = []object{{
		"kind":       "ConfigMap",
		"apiVersion": "v1",
		"metadata":   meta("config"),
		"data":       object{"key": "value"},
	}}
	objects["/api/v1/namespaces/default/secrets"] = []object{{
		"kind":       "Secret",
		"apiVersion": "v1",
		"metadata":   meta("secret"),
		"data":       object{"key": base64.StdEncoding.EncodeToString([]byte("value"))},
	}}

	return objects
}

// TestKubeletUserNamespaces runs pods with hostUsers false under the kubelet: volumes of every kind
// can be read and written, files on the node belong to root, the processes are nobody on the node,
// and the groups follow supplementalGroupsPolicy.
func TestKubeletUserNamespaces(t *testing.T) {
	for _, v := range engines.ShimVersions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v)
			hosts := filepath.Join(k.engine.Dir, "hosts")
			single := filepath.Join(hosts, "single")
			if err := os.Mkdir(hosts, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(single, nil, 0o644); err != nil {
				t.Fatal(err)
			}

			_, kubeconfig := k.serveAPI(t, usersObjects(hosts))
			k.run(t, k.config+"contentType: application/json\nconfigMapAndSecretChangeDetectionStrategy: Get\n",
				kubeconfig)

			id := k.awaitContainer(t, "users")
			eventually(t, "the volumes are in order", func() error {
				if out := k.exec(t, id, "test -e /tmp/ready && cat /tmp/report"); out != volumesReport {
					return errors.New(out)
				}
				return nil
			})

			for _, file := range []string{single, filepath.Join(hosts, "file")} {
				if b, err := os.ReadFile(file); err != nil || string(b) != "written\n" {
					t.Errorf("%s on the node: %q, %v", file, b, err)
				}
				if out, err := k.engine.Command("stat", "-c", "%u:%g", file).Output(); string(out) != "0:0\n" {
					t.Errorf("owner of %s on the node: %s, %v; want root", file, out, err)
				}
			}

			first := strings.Fields(k.exec(t, id, "cat /proc/self/uid_map"))
			if len(first) != 3 || first[0] != "0" || first[1] == "0" || first[2] != "65536" {
				t.Errorf("mapping of users %q", first)
			}

			for pod, want := range map[string]string{"strict": "1000 4000\n", "merge": "1000 4000 7777\n"} {
				if got := k.exec(t, k.awaitContainer(t, pod), "id -G"); got != want {
					t.Errorf("groups of pod %s: %q, want %q", pod, got, want)
				}
			}
		})
	}
}

// awaitContainer waits for the only container of a pod from the API, and returns its ID.
func (k *kubelet) awaitContainer(t *testing.T, pod string) (id string) {
	t.Helper()
	eventually(t, "pod "+pod+" runs", func() error {
		l, err := k.daemon.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"io.kubernetes.pod.name": pod}},
		})
		if err != nil {
			return err
		}

		if len(l.Containers) != 1 || l.Containers[0].State == runtimeapi.ContainerState_CONTAINER_CREATED {
			return fmt.Errorf("containers: %v", l.Containers)
		}

		id = l.Containers[0].Id

		return nil
	})

	return id
}

// exec runs a script in a container and returns its output.
func (k *kubelet) exec(t *testing.T, id, script string) string {
	t.Helper()
	r, err := k.daemon.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
		ContainerId: id,
		Cmd:         []string{"sh", "-c", script},
		Timeout:     10,
	})
	if err != nil {
		return err.Error()
	}

	return string(r.Stdout) + string(r.Stderr)
}
