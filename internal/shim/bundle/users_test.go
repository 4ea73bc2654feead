package bundle

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const usersAnnotation = `{"v":1,"userns":{"uids":{"first":1048576,"size":65536},"gids":{"first":2097152,"size":65536}}`

// usersSpec is the spec of a container that joins the namespaces of process 42.
func usersSpec() m {
	return m{
		"root":    m{"path": "/var/lib/docker/x", "readonly": true},
		"process": m{"cwd": "/"},
		"mounts": []any{
			m{"destination": "/proc", "type": "proc", "source": "proc"},
			m{"destination": "/etc/hosts", "type": "bind", "source": "/a/hosts", "options": []any{"rbind"}},
			m{"destination": "/v/", "type": "bind", "source": "/a/v"},
			m{"destination": "/plain", "type": "bind", "source": "/a/plain"},
		},
		"linux": m{
			"unknown":    1.0,
			"namespaces": []any{m{"type": "mount"}, m{"type": "ipc", "path": "/proc/42/ns/ipc"}},
			"sysctl":     m{"net.ipv4.ping_group_range": "0 2147483647", "kernel.shm_rmid_forced": "1"},
		},
	}
}

func openUsers(t *testing.T, spec m, rest string) (*Bundle, error) {
	t.Helper()
	return Open(write(t, spec, usersAnnotation+rest+"}"))
}

func TestMappedMounts(t *testing.T) {
	b, err := openUsers(t, usersSpec(), `,"idMapped":["/v"]`)
	if err != nil {
		t.Fatal(err)
	}

	got, err := b.MappedMounts()
	want := map[string]string{"/etc/hosts": "/a/hosts", "/v": "/a/v"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}

	b, err = openUsers(t, usersSpec(), `,"idMapped":["/proc"]`)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.MappedMounts(); err == nil {
		t.Errorf("mapped %v, but /proc is no bind mount", got)
	}
}

func TestPausePid(t *testing.T) {
	b, err := openUsers(t, usersSpec(), "")
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := b.PausePid(); err != nil || pid != 42 {
		t.Errorf("PID %d, %v; want 42", pid, err)
	}

	b.Spec.Linux.Namespaces[1].Path = "/proc/42/../1/ns/ipc"
	if pid, err := b.PausePid(); err == nil {
		t.Errorf("PID %d of a foreign path", pid)
	}

	b, err = openUsers(t, usersSpec(), `,"sandbox":{}`)
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := b.PausePid(); err != nil || pid != 0 {
		t.Errorf("PID %d, %v; want none for a pause", pid, err)
	}
}

// TestApplyUsers checks the whole spec of a container in a user namespace.
func TestApplyUsers(t *testing.T) {
	b, err := openUsers(t, usersSpec(), `,"idMapped":["/v"]`)
	if err != nil {
		t.Fatal(err)
	}
	users := &Users{
		Root:    "/run/s/0",
		Sources: map[string]string{"/etc/hosts": "/run/s/1", "/v": "/run/s/2"},
		NS:      "/proc/42/ns/user",
	}
	if err := b.Apply(func(string) bool { return true }, users); err != nil {
		t.Fatal(err)
	}

	text, err := os.ReadFile(filepath.Join(b.Dir, file))
	if err != nil {
		t.Fatal(err)
	}
	got := m{}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	delete(got, "annotations")

	want := usersSpec()
	want["root"].(m)["path"] = "/run/s/0"
	want["mounts"].([]any)[1].(m)["source"] = "/run/s/1"
	want["mounts"].([]any)[2].(m)["source"] = "/run/s/2"
	linux := want["linux"].(m)
	linux["namespaces"] = append(linux["namespaces"].([]any), m{"type": "user", "path": "/proc/42/ns/user"})
	linux["uidMappings"] = []any{m{"containerID": 0.0, "hostID": 1048576.0, "size": 65536.0}}
	linux["gidMappings"] = []any{m{"containerID": 0.0, "hostID": 2097152.0, "size": 65536.0}}
	linux["sysctl"].(m)["net.ipv4.ping_group_range"] = "0 65535"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
