package nri

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/plugins/default-validator/builtin"
	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// writeValidator writes a configuration of the default validator.
func writeValidator(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "validator.yaml")
	if err := os.WriteFile(file, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, mode); err != nil { // the umask
		t.Fatal(err)
	}
	return file
}

func TestReadValidator(t *testing.T) {
	got, err := readValidator("", writeValidator(t, "enable: true\nrejectOCIHookAdjustment: true\n"+
		"requiredPlugins: [a, b]\n", 0o600))
	want := &builtin.DefaultValidatorConfig{
		Enable:                  true,
		RejectOCIHookAdjustment: true,
		RequiredPlugins:         []string{"a", "b"},
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("configuration: %s, %v", diff, err)
	}

	if got, err := readValidator("", ""); got != nil || err != nil {
		t.Errorf("without a file: %v, %v", got, err)
	}
}

func TestReadBadValidator(t *testing.T) {
	for name, test := range map[string]struct {
		text, want string
		mode       os.FileMode
	}{
		"unknown field": {"enable: true\nrejectOCIHook: true\n", "rejectOCIHook", 0o600},
		"no YAML":       {"\x00", "yaml", 0o600},
		"wrong type":    {"enable: maybe\n", "maybe", 0o600},
		"empty":         {"\n", "empty", 0o600},
		"two documents": {"enable: true\n---\nenable: false\n", "more than one", 0o600},
		"too large":     {"# " + strings.Repeat("x", maxYAML), "bytes", 0o600},
		"writable":      {"enable: true\n", "write", 0o666},
	} {
		t.Run(name, func(t *testing.T) {
			file := writeValidator(t, test.text, test.mode)
			_, err := New(Config{Validator: file, Log: slog.New(slog.DiscardHandler)})
			if err == nil || !strings.Contains(err.Error(), test.want) ||
				!strings.Contains(err.Error(), "--nri-validator-config") || !strings.Contains(err.Error(), file) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

// TestValidator refuses adjustments of a real plugin by the default validator's rules.
func TestValidator(t *testing.T) {
	r, p := connectWith(t, &fakeNode{}, writeValidator(t, "enable: true\nrejectOCIHookAdjustment: true\n"+
		"rejectRuntimeDefaultSeccompAdjustment: true\n", 0o600))
	<-p.synced
	hold(t, r)

	c := testContainer()
	c.Process = &model.Process{Seccomp: runtimeapi.SecurityProfile_RuntimeDefault}
	unconfined := testContainer()
	unconfined.Process = &model.Process{Seccomp: runtimeapi.SecurityProfile_Unconfined}

	hook := func(a *api.ContainerAdjustment) { a.AddHooks(&api.Hooks{Poststart: []*api.Hook{{Path: "/bin/true"}}}) }
	seccomp := func(a *api.ContainerAdjustment) {
		a.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW"})
	}
	for name, test := range map[string]struct {
		adjust    func(*api.ContainerAdjustment)
		container *model.Container
		refused   string // "" if it is not
	}{
		"environment":                 {nil, c, ""},
		"hook":                        {hook, c, "OCI hook"},
		"seccomp of the default":      {seccomp, c, "seccomp"},
		"seccomp without confinement": {seccomp, unconfined, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p.adjust = test.adjust
			_, err := r.Create(t.Context(), testPod(), test.container)
			if test.refused == "" {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), test.refused) ||
				!strings.Contains(err.Error(), "10-test") {
				t.Errorf("error %v, want one of %q by 10-test", err, test.refused)
			}
		})
	}
}

// TestOwners names the plugin of each refused adjustment.
func TestOwners(t *testing.T) {
	r, p := connect(t, &fakeNode{})
	<-p.synced
	hold(t, r)

	for refused, adjust := range map[string]func(*api.ContainerAdjustment){
		"block I/O class": func(a *api.ContainerAdjustment) { a.SetLinuxBlockIOClass("x") },
		"io.containerd.x": func(a *api.ContainerAdjustment) { a.AddAnnotation("io.containerd.x", "") },
	} {
		p.adjust = adjust
		want := refused + " (by plugin 10-test)"
		if _, err := r.Create(t.Context(), testPod(), testContainer()); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}

	p.adjust = func(a *api.ContainerAdjustment) {
		a.AddHooks(&api.Hooks{Poststart: []*api.Hook{{Path: "/bin/true"}}})
		a.SetLinuxCPUShares(3)
		a.SetLinuxMemorySwappiness(3)
	}
	resp, err := r.Create(t.Context(), testPod(), testContainer())
	if err != nil {
		t.Fatal(err)
	}

	want := []string{"environment (by plugin 10-test)", "hooks (by plugin 10-test)", "swappiness (by plugin 10-test)"}
	if got := resp.Adjustment.NeedsShim(); !slices.Equal(got, want) {
		t.Errorf("it needs %q, want %q", got, want)
	}
	if got := resp.Adjustment.DescribeResources(); got != "resources (by plugin 10-test)" {
		t.Errorf("resources: %q", got)
	}
}
