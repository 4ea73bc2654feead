package conformance

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const absentProfile = "cri-dockerd-conformance-absent"

// appArmorProfile permits everything except writes to /denied.
const appArmorProfile = `profile %s flags=(attach_disconnected,mediate_deleted) {
  file,
  network,
  capability,
  signal,
  ptrace,
  deny /denied wl,
}
`

// hasAppArmor reports whether the kernel of this machine uses AppArmor. Engines use it wherever the
// kernel does.
func hasAppArmor() bool {
	b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.TrimSpace(string(b)) == "Y"
}

// loadAppArmor loads a profile until the end of the test, and returns its name.
func loadAppArmor(t *testing.T) (name string) {
	t.Helper()
	name = "cri-dockerd-conformance-" + strings.ReplaceAll(t.Name(), "/", "-")
	file := filepath.Join(t.TempDir(), "profile")
	if err := os.WriteFile(file, fmt.Appendf(nil, appArmorProfile, name), 0o600); err != nil {
		t.Fatal(err)
	}

	parse := func(ctx context.Context, option string) error {
		out, err := exec.CommandContext(ctx, "apparmor_parser", option, "--skip-cache", file).CombinedOutput()
		if err != nil {
			return fmt.Errorf("apparmor_parser %s (Debian: apt-get install apparmor): %w\n%s", option, err, out)
		}
		return nil
	}

	if err := parse(t.Context(), "--replace"); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		if err := parse(context.Background(), "--remove"); err != nil {
			t.Error(err)
		}
	})

	return name
}

// localProfiles returns a security context for each form of a reference to a profile, and the field
// with the reference.
func localProfiles(name string) map[string]*runtimeapi.LinuxContainerSecurityContext {
	localhost := func(ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
	}

	return map[string]*runtimeapi.LinuxContainerSecurityContext{
		"field":             {Apparmor: localhost(name)},
		"field with prefix": {Apparmor: localhost("localhost/" + name)},
		//nolint:staticcheck // kubelets before 1.30 send only the string
		"string": {ApparmorProfile: "localhost/" + name},
	}
}

// TestAppArmor runs containers under a profile of the node, and refuses those with a profile that
// is not loaded, or on a node without AppArmor. Profiles without a meaning there are accepted. It
// uses the field of Kubernetes 1.30 and the older string.
func TestAppArmor(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for form, sc := range localProfiles(absentProfile) {
			t.Run("absent, "+form, func(t *testing.T) {
				cc := n.containerConfig(sh("true"))
				cc.Linux.SecurityContext = sc
				assertAbsentProfile(t, n.createErr(t, pod, cfg, cc), sc.GetApparmor() == nil)
			})
		}

		for i, sc := range []*runtimeapi.LinuxContainerSecurityContext{
			{Apparmor: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}},
			{ApparmorProfile: "runtime/default"}, //nolint:staticcheck // kubelets before 1.30 send only this
		} {
			t.Run(fmt.Sprint("no profile ", i), func(t *testing.T) {
				cc := n.containerConfig(sh("true"))
				cc.Metadata.Name, cc.LogPath = fmt.Sprint("plain", i), ""
				cc.Linux.SecurityContext = sc
				n.startConfig(t, pod, cfg, cc)
			})
		}

		if hasAppArmor() {
			n.testLoadedProfile(t, pod, cfg)
		}
	})
}

// assertAbsentProfile expects an error with the field, the profile and, on a node with AppArmor,
// the remedy.
func assertAbsentProfile(t *testing.T, err error, isString bool) {
	t.Helper()
	field := "config.linux.security_context.apparmor"
	if isString {
		field += "_profile"
	}

	if hasAppArmor() {
		assertInvalidArgument(t, err, field+`: AppArmor profile "`+absentProfile+`" is not loaded on this node; `+
			"load it (apparmor_parser")
		return
	}

	assertInvalidArgument(t, err, field+`: profile "`+absentProfile+`": AppArmor is not enabled on this node`)
}

// testLoadedProfile runs containers under a profile of the node, with each form of a reference.
func (n *node) testLoadedProfile(t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig) {
	t.Helper()
	profile := loadAppArmor(t)
	for form, sc := range localProfiles(profile) {
		t.Run("loaded, "+form, func(t *testing.T) {
			cc := n.containerConfig(sh("sleep 1000"))
			cc.Metadata.Name, cc.LogPath = strings.ReplaceAll(form, " ", "-"), ""
			cc.Linux.SecurityContext = sc
			c := n.startConfig(t, pod, cfg, cc)
			if got := n.exec(t, c, "cat", "/proc/1/attr/current"); got != profile+" (enforce)\n" {
				t.Errorf("the container runs under %q", got)
			}

			// The shell ends with the status of the second command: only /denied is not writable.
			touch := "touch /denied || touch /allowed && ls / | grep ed$"
			if got := n.exec(t, c, "sh", "-c", touch); got != "allowed\n" {
				t.Errorf("files written under the profile: %q", got)
			}
		})
	}
}

// TestSandboxAppArmor does the same for the pause container. It starts with a loaded profile only,
// and a failed call leaves nothing behind.
func TestSandboxAppArmor(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		for form, sc := range localProfiles(absentProfile) {
			if sc.GetApparmor() == nil {
				continue // a sandbox has no string
			}

			t.Run("absent, "+form, func(t *testing.T) {
				cfg := n.podConfig(t)
				cfg.Linux.SecurityContext.Apparmor = sc.GetApparmor()
				_, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
				assertAbsentProfile(t, err, false)
				l, err := n.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
				if err != nil || strings.Contains(l.String(), cfg.Metadata.Uid) {
					t.Errorf("sandboxes after the refusal: %v, %v", l, err)
				}
			})
		}

		if !hasAppArmor() {
			return
		}

		profile := loadAppArmor(t)
		cfg := n.podConfig(t)
		cfg.Linux.SecurityContext.Apparmor = localProfiles(profile)["field with prefix"].GetApparmor()
		file := "/proc/" + n.sandboxPID(t, n.runPod(t, cfg)) + "/attr/current"
		if got, err := os.ReadFile(file); err != nil || string(got) != profile+" (enforce)\n" {
			t.Errorf("the pause runs under %q, %v", got, err)
		}
	})
}
