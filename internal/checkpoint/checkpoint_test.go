package checkpoint

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

const id model.ContainerID = "aaaabbbbccccddddaaaabbbbccccddddaaaabbbbccccddddaaaabbbbccccdddd"

// put writes a file below a root directory.
func put(t *testing.T, root, name, content string) string {
	t.Helper()
	file := filepath.Join(root, "sandbox", name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}

	return file
}

func TestReadCheckpointOfOlderShim(t *testing.T) {
	ours, theirs := t.TempDir(), t.TempDir()
	file := put(t, theirs, string(id), `{"version":"v1","name":"web","namespace":"default","data":{"port_mappings":[
		{"protocol":"tcp","container_port":80,"host_port":8080,"host_ip":""},
		{"protocol":"udp","container_port":53,"host_port":5353,"host_ip":"192.0.2.1"},
		{"protocol":"sctp","container_port":9,"host_port":9,"host_ip":""}]},"checksum":4294967295}`)

	f := New(ours, theirs, filepath.Join(ours, "nowhere"))
	got, err := f.Read(id)
	want := Checkpoint{
		Name:      "web",
		Namespace: "default",
		Ports: []*runtimeapi.PortMapping{
			{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 8080},
			{Protocol: runtimeapi.Protocol_UDP, ContainerPort: 53, HostPort: 5353, HostIp: "192.0.2.1"},
			{Protocol: runtimeapi.Protocol_SCTP, ContainerPort: 9, HostPort: 9},
		},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}

	if p := f.Path(id); p != file {
		t.Errorf("path %q", p)
	}

	put(t, ours, ".tmp-"+string(id), "x")
	put(t, ours, "lock", "x")
	if ids := f.List(); !cmp.Equal(ids, []model.ContainerID{id}) {
		t.Errorf("list: %v", ids)
	}

	for range 2 {
		if err := f.Remove(id); err != nil {
			t.Error(err)
		}
	}

	if _, err := f.Read(id); !errdefs.IsNotFound(err) {
		t.Errorf("after removal: %v", err)
	}
}

func TestHostNetworkAndBrokenFiles(t *testing.T) {
	root := t.TempDir()
	f := New(root)
	put(t, root, string(id), `{"version":"v1","name":"proxy","namespace":"kube-system","data":{"host_network":true},`+
		`"checksum":1}`)
	if c, err := f.Read(id); err != nil || !c.HostNetwork {
		t.Errorf("%+v, %v", c, err)
	}

	put(t, root, string(id), `{"version":"v1","na`)
	if _, err := f.Read(id); !errdefs.IsDataLoss(err) {
		t.Errorf("a broken file: %v", err)
	}

	if ids := f.List(); len(ids) != 1 {
		t.Errorf("a broken file is missing from the list: %v", ids)
	}
	if _, err := f.Read(""); !errdefs.IsNotFound(err) {
		t.Errorf("empty sandbox ID: %v", err)
	}

	if err := f.Remove(""); err != nil {
		t.Errorf("empty sandbox ID: %v", err)
	}

	if err := f.Write("", Checkpoint{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("empty sandbox ID: %v", err)
	}
}

func TestWriteForOlderShim(t *testing.T) {
	root := t.TempDir()
	f := New(root, t.TempDir())
	c := Checkpoint{
		Name:      "web",
		Namespace: "default",
		Ports: []*runtimeapi.PortMapping{{
			Protocol:      runtimeapi.Protocol_UDP,
			ContainerPort: 80,
			HostPort:      8080,
			HostIp:        "192.0.2.1",
		}},
	}
	if err := f.Write(id, c); err != nil {
		t.Fatal(err)
	}

	b, err := os.ReadFile(filepath.Join(root, "sandbox", string(id)))
	const want = `{"version":"v1","name":"web","namespace":"default","data":{"port_mappings":[{"protocol":"udp",` +
		`"container_port":80,"host_port":8080,"host_ip":"192.0.2.1"}]},"checksum":0}`
	if err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}

	if got, err := f.Read(id); err != nil || !cmp.Equal(got, c, protocmp.Transform()) {
		t.Errorf("%+v, %v", got, err)
	}

	if err := f.Write(id, Checkpoint{HostNetwork: true}); err != nil {
		t.Error(err)
	}

	if got, err := f.Read(id); err != nil || !got.HostNetwork || len(got.Ports) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestDirectoryInTheWay verifies that a directory with a checkpoint's name is ignored and does not
// block the removal of a pod.
func TestDirectoryInTheWay(t *testing.T) {
	root := t.TempDir()
	f := New(root)
	file := filepath.Join(root, "sandbox", string(id), "x")
	if err := os.MkdirAll(file, 0o700); err != nil {
		t.Fatal(err)
	}

	if _, err := f.Read(id); !errdefs.IsNotFound(err) {
		t.Errorf("read: %v", err)
	}

	if err := f.Remove(id); err != nil {
		t.Errorf("remove: %v", err)
	}

	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}
