package bundle

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/shim/annotation"
)

// write creates a bundle with a spec and an annotation.
func write(t *testing.T, spec map[string]any, want string) string {
	t.Helper()
	if want != "" {
		spec["annotations"] = map[string]any{annotation.Key: want}
	}

	text, err := json.Marshal(spec)
	dir := t.TempDir()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, file), text, 0o600)
	}

	if err != nil {
		t.Fatal(err)
	}

	return dir
}

// apply returns the spec after Apply.
func apply(t *testing.T, spec map[string]any, want string) (map[string]any, error) {
	t.Helper()
	b, err := Open(write(t, spec, want))
	if err == nil {
		err = b.Apply(func(size string) bool { return size != "16GB" }, nil)
	}

	if err != nil {
		return nil, err
	}

	text, err := os.ReadFile(filepath.Join(b.Dir, file))
	got := map[string]any{}
	if err == nil {
		err = json.Unmarshal(text, &got)
	}

	delete(got, "annotations")

	return got, err
}

type m = map[string]any

func newSpec() m {
	return m{
		"future": m{"big": 1.0}, // a field of a newer specification
		"process": m{
			"future":       []any{"x"},
			"user":         m{"uid": 1000.0, "gid": 1000.0, "additionalGids": []any{7.0, 8.0}},
			"capabilities": m{"bounding": []any{"CAP_CHOWN", "CAP_KILL"}, "effective": []any{"CAP_KILL"}},
		},
		"mounts": []any{
			m{"destination": "/", "options": []any{"ro"}},
			m{"destination": "/a/", "options": []any{"rbind", "ro"}, "future": true},
			m{"destination": "/b", "options": []any{"rbind"}},
		},
		"linux": m{
			"namespaces": []any{m{"type": "network"}, m{"type": "pid"}},
			"resources":  m{"unified": m{"memory.high": "1"}, "pids": m{"limit": 5.0}},
		},
	}
}

func TestMountOptions(t *testing.T) {
	mounts := m{"mounts": []any{m{"destination": "/a/", "options": []any{"rbind"}}, m{"destination": "/b"}}}
	got, err := apply(t, mounts, `{"v":1,"mountOptions":{"/a":["noexec"],"/b":["nodev","nosuid"]}}`)
	if err != nil {
		t.Fatal(err)
	}

	want := []any{
		m{"destination": "/a/", "options": []any{"rbind", "noexec"}},
		m{"destination": "/b", "options": []any{"nodev", "nosuid"}},
	}
	if diff := cmp.Diff(want, got["mounts"]); diff != "" {
		t.Error(diff)
	}

	if _, err := apply(t, mounts, `{"v":1,"mountOptions":{"/c":["noexec"]}}`); err == nil {
		t.Error("options of a missing mount were ignored")
	}
}

func TestApply(t *testing.T) {
	for name, c := range map[string]struct {
		annotation string
		change     func(m)
	}{
		"no annotation": {"", func(m) {}},
		"nothing":       {`{"v":1}`, func(m) {}},
		"sandbox alone": {`{"v":1,"sandbox":{}}`, func(m) {}},
		"network namespace": {`{"v":1,"sandbox":{"netns":"/run/a"}}`, func(s m) {
			s["linux"].(m)["namespaces"] = []any{m{"type": "pid"}, m{"type": "network", "path": "/run/a"}}
		}},
		"no groups": {`{"v":1,"strictGroups":[]}`, func(s m) {
			s["process"].(m)["user"].(m)["additionalGids"] = []any{1000.0}
		}},
		"groups": {`{"v":1,"strictGroups":[9,1000]}`, func(s m) {
			s["process"].(m)["user"].(m)["additionalGids"] = []any{1000.0, 9.0}
		}},
		"recursive": {`{"v":1,"recursiveReadOnly":["/a"]}`, func(s m) {
			s["mounts"].([]any)[1].(m)["options"] = []any{"rbind", "rro"}
		}},
		"ambient": {`{"v":1,"ambient":["CAP_CHOWN"]}`, func(s m) {
			s["process"].(m)["capabilities"] = m{
				"bounding":    []any{"CAP_CHOWN", "CAP_KILL"},
				"effective":   []any{"CAP_KILL", "CAP_CHOWN"},
				"permitted":   []any{"CAP_CHOWN"},
				"inheritable": []any{"CAP_CHOWN"},
				"ambient":     []any{"CAP_CHOWN"},
			}
		}},
		"limits": {`{"v":1,"unified":{"memory.oom.group":"1"},"hugepages":{"2MB":4,"1GB":0,"16GB":0}}`, func(s m) {
			r := s["linux"].(m)["resources"].(m)
			r["unified"].(m)["memory.oom.group"] = "1"
			r["hugepageLimits"] = []any{m{"pageSize": "1GB", "limit": 0.0}, m{"pageSize": "2MB", "limit": 4.0}}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := apply(t, newSpec(), c.annotation)
			if err != nil {
				t.Fatal(err)
			}

			want := newSpec()
			c.change(want)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("spec differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestApplyRejects(t *testing.T) {
	for name, text := range map[string]string{
		"invalid annotation":                             `{"v":3}`,
		"recursive writable mount":                       `{"v":1,"recursiveReadOnly":["/b"]}`,
		"recursive missing mount":                        `{"v":1,"recursiveReadOnly":["/c"]}`,
		"ambient capability outside of the bounding set": `{"v":1,"ambient":["CAP_SYS_ADMIN"]}`,
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := apply(t, newSpec(), text); err == nil {
				t.Errorf("Apply gave %v, want an error", got)
			}
		})
	}
}

func TestExec(t *testing.T) {
	b, err := Open(write(t, newSpec(), `{"v":1,"strictGroups":[9],"ambient":["CAP_CHOWN"]}`))
	if err != nil {
		t.Fatal(err)
	}

	const caps = `"capabilities":{"bounding":["CAP_CHOWN"]},"new":1`
	for name, c := range map[string]struct{ in, want string }{
		"same user":       {`{"user":{"uid":1000,"gid":1000,"additionalGids":[7]},` + caps + `}`, `Gids":[1000,9]`},
		"other user":      {`{"user":{"uid":0,"gid":0,"additionalGids":[7]},` + caps + `}`, `Gids":[7]`},
		"no capabilities": {`{"user":{"uid":1000,"gid":1000},"new":1}`, `"additionalGids":[1000,9]`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := b.Exec().Edit([]byte(c.in))
			if err != nil {
				t.Fatal(err)
			}

			for _, part := range []string{c.want, `"new":1`} {
				if !strings.Contains(string(got), part) {
					t.Errorf("Exec(%s) = %s, want %s", c.in, got, part)
				}
			}
			if isSame := name == "same user"; isSame != strings.Contains(string(got), `"ambient":["CAP_CHOWN"]`) {
				t.Errorf("Exec(%s) = %s: ambient capabilities of another user, or none", c.in, got)
			}
		})
	}
}

func TestUsesSystemd(t *testing.T) {
	for path, want := range map[string]bool{
		"/kubepods/pod1/abc":                 false,
		"kubepods-pod1.slice:docker:abc":     true,
		"/a:b:c":                             false,
		"":                                   false,
		"system.slice:docker:0123456789abcd": true,
	} {
		t.Run(path, func(t *testing.T) {
			b, err := Open(write(t, m{"linux": m{"cgroupsPath": path}}, ""))
			if err != nil || b.UsesSystemd() != want {
				t.Errorf("UsesSystemd = %v (%v), want %v", !want, err, want)
			}
		})
	}
}
