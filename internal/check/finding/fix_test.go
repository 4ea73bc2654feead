package finding

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/shell"
)

// fixFile runs a shell line on a file with this content and returns the new content.
func fixFile(t *testing.T, content string, fix func(file string) shell.Line) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}

	if out, err := exec.Command("sh", "-c", fix(file).String()).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", fix(file), err, out)
	}

	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	return string(b)
}

// TestDropFlags removes flags from typical lines of units and environment files.
func TestDropFlags(t *testing.T) {
	for _, c := range []struct{ before, after string }{
		{
			`KUBELET_KUBEADM_ARGS="--network-plugin=cni --node-ip=10.0.0.1"`,
			`KUBELET_KUBEADM_ARGS=" --node-ip=10.0.0.1"`,
		},
		{
			`KUBELET_KUBEADM_ARGS="--node-ip=10.0.0.1 --network-plugin=cni"`,
			`KUBELET_KUBEADM_ARGS="--node-ip=10.0.0.1"`,
		},
		{
			`KUBELET_KUBEADM_ARGS="--a=b --network-plugin=cni --container-runtime=remote --c=d"`,
			`KUBELET_KUBEADM_ARGS="--a=b --c=d"`,
		},
		{
			`ExecStart=/usr/bin/kubelet --container-runtime remote --network-plugin cni $KUBELET_CONFIG`,
			`ExecStart=/usr/bin/kubelet $KUBELET_CONFIG`,
		},
		{
			`ExecStart=/usr/bin/kubelet --network-plugin=cni`,
			`ExecStart=/usr/bin/kubelet`,
		},
		{
			`X="--network-plugin-mtu=1 --container-runtime-endpoint=unix:///run/x.sock --network-plugin --a=b"`,
			`X="--network-plugin-mtu=1 --container-runtime-endpoint=unix:///run/x.sock --a=b"`,
		},
		{
			`X="--network-plugin= --a"`,
			`X=" --a"`,
		},
	} {
		t.Run(c.before, func(t *testing.T) {
			got := fixFile(t, c.before+"\n", func(file string) shell.Line {
				return dropFlags([]string{file}, "network-plugin", "container-runtime")
			})

			if diff := cmp.Diff(c.after+"\n", got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSetKubelet(t *testing.T) {
	for before, after := range map[string]string{
		"kind: KubeletConfiguration\nfailSwapOn: true\nz: 1\n": "kind: KubeletConfiguration\nz: 1\nfailSwapOn: false\n",
		"kind: KubeletConfiguration\nfailSwapOn: true\n":       "kind: KubeletConfiguration\nfailSwapOn: false\n",
		"kind: KubeletConfiguration":                           "kind: KubeletConfiguration\nfailSwapOn: false\n",
	} {
		t.Run(before, func(t *testing.T) {
			got := fixFile(t, before, func(file string) shell.Line {
				return (&Facts{Kubelet: Kubelet{ConfigFile: file}}).setKubelet("failSwapOn", "false", "fail-swap-on")
			})

			if diff := cmp.Diff(after, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAddKubeletFlag(t *testing.T) {
	for before, after := range map[string]string{
		"":                                   "KUBELET_EXTRA_ARGS=\"--a=b\"\n",
		"# flags\nKUBELET_EXTRA_ARGS=\n":     "# flags\nKUBELET_EXTRA_ARGS=\" --a=b\"\n",
		"KUBELET_EXTRA_ARGS=--x=unix:///y\n": "KUBELET_EXTRA_ARGS=\"--x=unix:///y --a=b\"\n",
		"KUBELET_EXTRA_ARGS=\"--x --y\"\n":   "KUBELET_EXTRA_ARGS=\"--x --y --a=b\"\n",
	} {
		t.Run(before, func(t *testing.T) {
			got := fixFile(t, before, func(file string) shell.Line { return addKubeletFlag(file, "--a=b") })

			if diff := cmp.Diff(after, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSetDaemonJSON(t *testing.T) {
	for before, keys := range map[string]int{
		"":                        1,
		"{}":                      1,
		`{"live-restore": false}`: 1,
		"{\n  \"debug\": true,\n  \"live-restore\":false\n}\n": 2,
		`{"debug": {"a": 1}}`: 2,
		"{\n\"a\": 1\n}":      2,
	} {
		t.Run(before, func(t *testing.T) {
			got := fixFile(t, before, func(file string) shell.Line {
				f := &Facts{Engine: Engine{Config: Config{File: file, Text: before}}}
				_ = json.Unmarshal([]byte(before), &f.Engine.Config.Keys) // "" has no keys
				return f.setDaemonJSON("live-restore", "true", "reload")
			})

			var after map[string]any
			if err := json.Unmarshal([]byte(got), &after); err != nil || after["live-restore"] != true ||
				len(after) != keys {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}
