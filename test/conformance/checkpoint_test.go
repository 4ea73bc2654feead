package conformance

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// counter counts in memory, and writes the count to a file.
const counter = `echo kept > /changed; rm /etc/group; i=0
while true; do i=$((i + 1)); echo $i > /tmp/count; sleep 0.1; done`

// TestCheckpoint checks the archive of CheckpointContainer, that the container continues to run,
// and what is refused.
func TestCheckpoint(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh(counter))
		dir := n.tempDir(t)
		location := filepath.Join(dir, "checkpoint.tar")
		checkpoint := func(id string) error {
			_, err := n.Runtime.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{
				ContainerId: id,
				Location:    location,
				Timeout:     60,
			})
			return err
		}

		if *endpoint == "" {
			err := checkpoint(c)
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "criu") {
				t.Errorf("without criu: %v", err)
			}
			assertEmptyDir(t, dir)
			n.eng.InstallCRIU(t)
		}

		if err := checkpoint(pod); status.Code(err) != codes.NotFound {
			t.Errorf("checkpoint of a sandbox: %v", err)
		}

		before := n.exec(t, c, "cat", "/tmp/count")
		if err := checkpoint(c); err != nil {
			t.Fatal(err)
		}

		if !within(10*time.Second, func() bool { return n.exec(t, c, "cat", "/tmp/count") != before }) {
			t.Error("the container does not continue")
		}

		files := readArchive(t, location)
		for _, name := range []string{"checkpoint/inventory.img", "checkpoint/core-1.img", "dump.log"} {
			if len(files[name]) == 0 {
				t.Errorf("the archive lacks %s", name)
			}
		}

		var spec struct{ Process struct{ Args []string } }
		if err := json.Unmarshal(files["spec.dump"], &spec); err != nil || len(spec.Process.Args) != 3 {
			t.Errorf("spec: %+v, %v", spec, err)
		}

		var config struct{ ID, Name, RootfsImageName, Runtime string }
		err := json.Unmarshal(files["config.dump"], &config)
		if err != nil || config.ID != c || config.RootfsImageName != n.image {
			t.Errorf("config: %+v, %v", config, err)
		}

		if n.eng == nil { // the archive of containerd 2.4 has no end
			return
		}

		layer := readTar(t, strings.NewReader(string(files["rootfs-diff.tar"])))
		if string(layer["changed"]) != "kept\n" || layer["etc/.wh.group"] == nil || layer["bin/busybox"] != nil {
			t.Errorf("changes of the root: %q", layer)
		}

		if err := os.Remove(location); err != nil {
			t.Fatal(err)
		}
		assertEmptyDir(t, dir)
	})
}

// TestCheckpointWithoutTheShim expects a reason.
func TestCheckpointWithoutTheShim(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t, "--containers=engine")
		cfg := n.podConfig(t)
		c := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		dir := n.tempDir(t)
		_, err := n.Runtime.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{
			ContainerId: c,
			Location:    filepath.Join(dir, "checkpoint.tar"),
		})
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "--containers") {
			t.Errorf("error %v", err)
		}
		assertEmptyDir(t, dir)
	})
}

func assertEmptyDir(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("left in %s: %v, %v", dir, entries, err)
	}
}

// readArchive returns the regular files of a tar archive.
func readArchive(t *testing.T, file string) map[string][]byte {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if st, err := f.Stat(); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the archive: %v, %v", st.Mode(), err)
	}

	return readTar(t, f)
}

func readTar(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}

		b, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}

		files[strings.TrimPrefix(h.Name, "./")] = append([]byte{}, b...)
	}
}
