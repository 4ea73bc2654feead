package conformance

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// hostileConfigs are image configurations by hostile authors, as members of the object "config"
// (OCI image-spec, config.md).
var hostileConfigs = map[string]string{
	"labels":      `"Labels":{` + manyLabels(11, 1<<20) + `}`,
	"many-labels": `"Labels":{` + manyLabels(60000, 200) + `}`,
	"reserved": `"Labels":{"io.kubernetes.docker.type":"podsandbox","io.cri-dockerd.record":"{",` +
		`"io.kubernetes.container.name":"POD"}`,
	"ports":       `"ExposedPorts":{"99999/foo":{},"":{},"80/tcp/udp":{},"-1":{}}`,
	"volumes":     `"Volumes":{"relative":{},"":{},"/a:/b:z":{},"/../..":{}}`,
	"environment": `"Env":["","NOVALUE","=","A=` + strings.Repeat("x", 3<<20) + `"]`,
	"health": `"Healthcheck":{"Test":["CMD-SHELL","exit 1"],"Interval":-9223372036854775808,"Timeout":1,` +
		`"Retries":-2147483648}`,
	"user":    `"User":"` + strings.Repeat("u", 1<<20) + `","WorkingDir":"/\u0000","StopSignal":"\u202e"`,
	"types":   `"Env":{"a":1},"ExposedPorts":["80"],"Volumes":7,"Labels":["a"],"Healthcheck":"no"`,
	"numbers": `"Healthcheck":{"Interval":1e400,"Retries":99999999999999999999},"Memory":"lots"`,
}

func manyLabels(n, size int) string {
	var b strings.Builder
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `"label-%06d":"%s"`, i, strings.Repeat("l", size))
	}

	return b.String()
}

// hostileArchive returns an image in the format of docker save, with a shell and the given
// configuration.
func hostileArchive(t *testing.T, ref, config string) []byte {
	t.Helper()
	layer := tarOf(t, engines.BusyboxFiles(t)...)
	sum := sha256.Sum256(layer)
	image := fmt.Sprintf(`{"architecture":"amd64","os":"linux","created":"2020-01-01T00:00:00Z",`+
		`"config":{"Cmd":["sh"],%s},`+
		`"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, config, hex.EncodeToString(sum[:]))
	manifest := fmt.Sprintf(`[{"Config":"config.json","RepoTags":[%q],"Layers":["layer.tar"]}]`, ref)
	regular := func(name string, content []byte) engines.File {
		return engines.File{Header: tar.Header{Name: name, Mode: 0o644}, Content: content}
	}

	return tarOf(t, regular("config.json", []byte(image)), regular("layer.tar", layer),
		regular("manifest.json", []byte(manifest)))
}

func tarOf(t *testing.T, files ...engines.File) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		f.Header.Size = int64(len(f.Content))
		if err := w.WriteHeader(&f.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.Content); err != nil {
			t.Fatal(err)
		}
	}

	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	return b.Bytes()
}

// loadHostile loads an image and reports whether the engine accepts it. The engine may refuse it.
func (n *node) loadHostile(t *testing.T, ref, config string) (loaded bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	docker := n.own(t).Docker(t)
	r, err := docker.ImageLoad(ctx, bytes.NewReader(hostileArchive(t, ref, config)))
	if err != nil {
		t.Logf("%s is refused by the engine: %.300v", ref, err)
		return false
	}
	defer r.Close()

	output, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}

	if bytes.Contains(output, []byte(`"error"`)) {
		t.Logf("%s is refused by the engine: %.300s", ref, output)
		return false
	}

	return true
}

// TestHostileImages loads images with hostile configurations. Their own containers are created or
// refused with an error. Everything else on the node is listed, inspected and removed as before,
// also after a restart of the daemon.
func TestHostileImages(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		good := n.start(t, pod, cfg, sh("sleep 1000"))
		created := map[string]string{}
		for name, config := range hostileConfigs {
			ref := "hostile/" + name + ":1"
			if !n.loadHostile(t, ref, config) {
				continue
			}

			cc := n.containerConfig(sh("sleep 1000"))
			cc.Metadata.Name, cc.LogPath, cc.Image.Image = name, name+".log", ref
			r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
				PodSandboxId:  pod,
				Config:        cc,
				SandboxConfig: cfg,
			})
			if err != nil {
				t.Logf("%s: create: %.300v", name, err)
				n.assertAllListed(t, pod, good, created)
				continue
			}

			created[name] = r.ContainerId
			if _, err := n.Runtime.StartContainer(t.Context(),
				&runtimeapi.StartContainerRequest{ContainerId: r.ContainerId}); err != nil {
				t.Logf("%s: start: %.300v", name, err)
			}

			n.assertAllListed(t, pod, good, created)
		}

		if len(created) < 4 {
			t.Errorf("only %d images could be used, want at least 4", len(created))
		}

		n.assertOutputCut(t, good)
		n.Restart(t)
		n.assertAllListed(t, pod, good, created)
		if _, err := n.Runtime.StopPodSandbox(t.Context(),
			&runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}

		if _, err := n.Runtime.RemovePodSandbox(t.Context(),
			&runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}

		l, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
		if err != nil || len(l.Containers) != 0 {
			t.Errorf("ListContainers after the removal: %d containers, %v", len(l.GetContainers()), err)
		}
	})
}

// assertAllListed checks that lists and statuses contain the good container and all created ones.
func (n *node) assertAllListed(t *testing.T, pod, good string, created map[string]string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	listed := map[string]bool{}
	l, err := n.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatalf("ListContainers: %v", err)
	}

	for _, c := range l.Containers {
		listed[c.Id] = true
		if len(c.Labels)+len(c.Annotations) > 0 {
			t.Errorf("ListContainers has %d labels of an image", len(c.Labels))
		}
	}

	ids := []string{good}
	for _, id := range created {
		ids = append(ids, id)
	}

	for _, id := range ids {
		s, err := n.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
		if err != nil || !listed[id] || len(s.Status.Labels) > 0 {
			t.Errorf("ContainerStatus %s: listed %t, %v", id, listed[id], err)
		}
	}

	if s, err := n.Runtime.PodSandboxStatus(ctx,
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true}); err != nil ||
		len(s.ContainersStatuses) != len(ids) {
		t.Errorf("PodSandboxStatus: %d containers, want %d, %v", len(s.GetContainersStatuses()), len(ids), err)
	}

	images, err := n.Image.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatalf("ListImages: %v", err)
	}

	for _, i := range images.Images {
		if _, err := n.Image.ImageStatus(ctx,
			&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: i.Id}, Verbose: true}); err != nil {
			t.Errorf("ImageStatus %v: %v", i.RepoTags, err)
		}
	}

	if r, err := n.Runtime.ExecSync(ctx,
		&runtimeapi.ExecSyncRequest{ContainerId: good, Cmd: []string{"echo", "healthy"}}); err != nil ||
		string(r.Stdout) != "healthy\n" {
		t.Errorf("ExecSync: %v, %v", r, err)
	}
}

// assertOutputCut checks that 40 MB of exec output are cut to the kubelet's limit.
func (n *node) assertOutputCut(t *testing.T, container string) {
	t.Helper()
	flood := &runtimeapi.ExecSyncRequest{
		ContainerId: container,
		Cmd:         sh("head -c 20000000 /dev/zero; head -c 20000000 /dev/zero >&2"),
	}
	if r, err := n.Runtime.ExecSync(t.Context(), flood); status.Code(err) == codes.ResourceExhausted || err == nil &&
		len(r.Stdout)+len(r.Stderr) < 16<<20-1024 {
		t.Errorf("ExecSync of 40 MB: %d and %d bytes, %v", len(r.GetStdout()), len(r.GetStderr()), err)
	}
}
