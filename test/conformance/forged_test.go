package conformance

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/registry"
)

// forgedLabels returns labels of an image whose author tries to deceive the daemon. victim is a
// file outside of the container, and must remain.
func forgedLabels(victim string) map[string]string {
	up := strings.Repeat("../", 12)

	return map[string]string{
		"io.kubernetes.docker.type":               "podsandbox",
		"io.kubernetes.sandbox.id":                strings.Repeat("f", 64),
		"io.kubernetes.container.logpath":         victim,
		"io.kubernetes.container.name":            "POD",
		"io.kubernetes.pod.uid":                   "victim",
		"io.kubernetes.pod.name":                  "victim",
		"io.kubernetes.pod.namespace":             "kube-system",
		"annotation.io.kubernetes.container.hash": "forged",
		"io.cri-dockerd.record": `{"v":1,"name":"k8s_main_web_default_u_0",` +
			`"container":{"sandboxID":"` + strings.Repeat("f", 64) + `","image":"x","logPath":"` + victim + `"}}`,
		"io.cri-dockerd.image-volumes": `[{"image":"sha256:` + up + strings.TrimPrefix(victim, "/") +
			`","target":"/x"}]`,
		"io.cri-dockerd.image-volume": "sha256:" + up + strings.TrimPrefix(victim, "/"),
		"io.cri-dockerd.limits":       `{"hugepages":{"` + up + `x":1},"unified":{"` + up + `x":"1"}}`,
		"io.cri-dockerd.pid":          "NODE",
		"io.cri-dockerd.netns":        "own",
		"io.cri-dockerd.pinned":       "true",
		"io.cri-dockerd.label.app":    "forged",
		"app":                         "forged",
	}
}

// TestForgedLabels runs containers of one image with and without forged labels. All responses are
// equal, and no file is removed.
func TestForgedLabels(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		victim := filepath.Join(n.tempDir(t), "victim")
		if err := os.WriteFile(victim, []byte("stays"), 0o600); err != nil {
			t.Fatal(err)
		}

		clean := registry.Files(t, map[string]string{"file": fmt.Sprint(t.Name())})
		image := func(name string, labels map[string]string) string {
			i, err := mutate.Config(clean, v1.Config{Entrypoint: []string{"/none"}, Labels: labels})
			if err != nil {
				t.Fatal(err)
			}

			id, err := n.pull(t.Context(), n.registry(t).Put(t, name, "1", i), nil)
			if err != nil {
				t.Fatal(err)
			}

			return id
		}

		large := forgedLabels(victim)
		large["large"] = strings.Repeat("x", 1<<20)
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)

		want := n.describe(t, sandbox, pod, image("forged-clean", nil))
		for name, labels := range map[string]map[string]string{"forged": forgedLabels(victim), "forged-large": large} {
			t.Run(name, func(t *testing.T) {
				got := n.describe(t, sandbox, pod, image(name, labels))
				if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
					t.Errorf("%s (-clean +forged):\n%s", name, diff)
				}
			})
		}

		if b, err := os.ReadFile(victim); err != nil || string(b) != "stays" {
			t.Errorf("the file outside of the container: %q, %v", b, err)
		}

		n.removePod(t, sandbox)
		n.assertNoLeftovers(t, pod)
	})
}

// described is the CRI's description of a container and its image, without the fields specific to
// an image.
type described struct {
	Status *runtimeapi.ContainerStatus
	Item   *runtimeapi.Container
	Pinned bool
}

// describe creates a container of an image, reads its description and removes it.
func (n *node) describe(t *testing.T, sandbox string, pod *runtimeapi.PodSandboxConfig, image string) described {
	t.Helper()
	cc := n.containerConfig(nil)
	cc.Image.Image = image
	cc.Labels = map[string]string{"io.kubernetes.container.name": "main"}
	id := n.create(t, sandbox, pod, cc)
	if n.imageStatus(t, image) == nil {
		t.Fatalf("image %s is missing", image)
	}

	l, err := n.Runtime.ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
	if err != nil || len(l.Containers) != 1 {
		t.Fatalf("ListContainers: %v, %v", l, err)
	}

	out := described{
		Status: n.containerStatus(t, id),
		Item:   l.Containers[0],
		Pinned: n.imageStatus(t, image).Pinned,
	}
	if _, err := n.Runtime.RemoveContainer(t.Context(),
		&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}

	if diff := cmp.Diff(out.Status.Labels, out.Item.Labels); diff != "" {
		t.Error(diff)
	}

	s, i := out.Status, out.Item
	s.Id, s.Image, s.ImageRef, s.ImageId, s.CreatedAt = "", nil, "", "", 0
	i.Id, i.Image, i.ImageRef, i.ImageId, i.CreatedAt = "", nil, "", "", 0

	return out
}

// TestForgedHolder creates a container with the label of older image-volume holders. The daemon
// does not treat it as a holder, not even after a restart.
func TestForgedHolder(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		victim := filepath.Join(n.tempDir(t), "victim")
		if err := os.WriteFile(victim, []byte("stays"), 0o600); err != nil {
			t.Fatal(err)
		}

		args := []string{"create", "--name", "bystander"}
		for k, v := range forgedLabels(victim) {
			args = append(args, "--label", k+"="+v)
		}

		n.docker(t, append(args, n.image, "true")...)
		const bystander = "name=^/bystander$"
		before := n.docker(t, "ps", "-aq", "--no-trunc", "--filter", bystander)

		n.Change(t)
		n.AwaitReady(t)
		pod := n.podConfig(t)
		n.removePod(t, n.runPod(t, pod))
		if after := n.docker(t, "ps", "-aq", "--no-trunc", "--filter", bystander); after != before {
			t.Errorf("container before the restart %s, after it %s", before, after)
		}
		if _, err := os.Stat(victim); err != nil {
			t.Error(err)
		}

		l, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
		if err != nil || len(l.Containers) > 0 {
			t.Errorf("ListContainers: %v, %v", l, err)
		}
	})
}

// TestPinnedImages pins images by name and by label. No other image is pinned.
func TestPinnedImages(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n = n.withDaemon(t, "--pinned-images=pins/by-name,pins/none:*", "--pinned-image-labels=team=platform")
		for name, c := range map[string]struct {
			labels map[string]string
			want   bool
		}{
			"by-name":  {nil, true},
			"by-label": {map[string]string{"team": "platform"}, true},
			"other":    {map[string]string{"team": "other"}, false},
			"forged":   {maps.Clone(forgedLabels("/etc/victim")), false},
		} {
			t.Run(name, func(t *testing.T) {
				args := []string{}
				for k, v := range c.labels {
					args = append(args, "--change", fmt.Sprintf("LABEL %q=%q", k, v))
				}

				n.docker(t, append(append([]string{"import"}, args...), n.smallTar(t), "pins/"+name+":1")...)
				if got := n.imageStatus(t, "pins/"+name+":1"); got == nil || got.Pinned != c.want {
					t.Errorf("%s: %v, want pinned %t", name, got, c.want)
				}
			})
		}
	})
}

// smallTar creates an archive with one file.
func (n *node) smallTar(t *testing.T) string {
	t.Helper()
	dir := n.tempDir(t)
	n.run(t, "sh", "-ec", "echo x > "+dir+"/file; tar -C "+dir+" -cf "+dir+"/image.tar file")
	return dir + "/image.tar"
}
