package cri

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakeAppArmor lists the profiles of the world.
type fakeAppArmor struct{ *world }

func (a fakeAppArmor) IsLoaded(profile string) (bool, error) {
	if a.appArmor == nil {
		return false, errors.New("securityfs is not mounted")
	}
	return a.has(a.appArmor, profile), nil
}

func localhostProfile(ref string) *runtimeapi.SecurityProfile {
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
}

// appArmorCases are requests for AppArmor profiles on a node with the profile "loaded". field is
// the field in the error, "" for a container or pod that starts with the profile want.
func appArmorCases() map[string]struct {
	sc          *runtimeapi.LinuxContainerSecurityContext
	unlisted    bool // the kernel does not list its profiles
	field, want string
} {
	//nolint:staticcheck // kubelets before 1.30 send only the string
	return map[string]struct {
		sc          *runtimeapi.LinuxContainerSecurityContext
		unlisted    bool
		field, want string
	}{
		"loaded": {
			sc:   &runtimeapi.LinuxContainerSecurityContext{Apparmor: localhostProfile("loaded")},
			want: "loaded",
		},
		"loaded, with prefix": {
			sc:   &runtimeapi.LinuxContainerSecurityContext{Apparmor: localhostProfile("localhost/loaded")},
			want: "loaded",
		},
		"loaded, as a string": {
			sc:   &runtimeapi.LinuxContainerSecurityContext{ApparmorProfile: "localhost/loaded"},
			want: "loaded",
		},
		"missing": {
			sc:    &runtimeapi.LinuxContainerSecurityContext{Apparmor: localhostProfile("absent")},
			field: "config.linux.security_context.apparmor",
		},
		"missing, with prefix": {
			sc:    &runtimeapi.LinuxContainerSecurityContext{Apparmor: localhostProfile("localhost/absent")},
			field: "config.linux.security_context.apparmor",
		},
		"missing, as a string": {
			sc:    &runtimeapi.LinuxContainerSecurityContext{ApparmorProfile: "localhost/absent"},
			field: "config.linux.security_context.apparmor_profile",
		},
		"unlisted": {
			sc:       &runtimeapi.LinuxContainerSecurityContext{Apparmor: localhostProfile("absent")},
			unlisted: true,
			want:     "absent",
		},
		"of the engine": {
			sc:   &runtimeapi.LinuxContainerSecurityContext{Apparmor: localhostProfile("docker-default")},
			want: "docker-default",
		},
		"default": {sc: &runtimeapi.LinuxContainerSecurityContext{ApparmorProfile: "runtime/default"}},
	}
}

// TestAppArmor checks that a profile that is not loaded is refused before the engine is called, and
// that the engine gets the name of a loaded one.
func TestAppArmor(t *testing.T) {
	for name, test := range appArmorCases() {
		t.Run(name, func(t *testing.T) {
			s, w := newService(t)
			cfg := w.pod()
			pod := runPod(t, s, cfg)
			if !test.unlisted {
				w.appArmor = map[string]bool{"loaded": true}
			}

			r := createRequest(pod, cfg)
			r.Config.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: test.sc}
			before := w.engine.Containers()
			_, err := s.CreateContainer(t.Context(), r)
			assertAppArmor(t, w, err, test.field, test.want)
			if created := w.engine.Containers() - before; created != 1 && test.field == "" ||
				created != 0 && test.field != "" {
				t.Errorf("%d containers were created", created)
			}
		})
	}
}

// TestSandboxAppArmor checks the same for the pause container.
func TestSandboxAppArmor(t *testing.T) {
	for name, test := range appArmorCases() {
		if test.sc.GetApparmor() == nil {
			continue // a sandbox has only the field
		}

		t.Run(name, func(t *testing.T) {
			s, w := newService(t)
			if !test.unlisted {
				w.appArmor = map[string]bool{"loaded": true}
			}

			cfg := w.pod()
			cfg.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				Apparmor: test.sc.GetApparmor(),
			}}

			_, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
			assertAppArmor(t, w, err, test.field, test.want)
			if test.field != "" {
				w.assertNoLeftovers(t, s)
			}
		})
	}
}

// assertAppArmor expects an error for a field, with the profile and the remedy, or a container with
// a profile.
func assertAppArmor(t *testing.T, w *world, err error, field, want string) {
	t.Helper()
	if field != "" {
		for _, part := range []string{field + `: AppArmor profile "absent" is not loaded`, "apparmor_parser"} {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), part) {
				t.Errorf("error %v, want InvalidArgument with %q", err, part)
			}
		}
		return
	}

	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range w.engine.SecurityOptions() {
		if profile, isAppArmor := strings.CutPrefix(o, "apparmor="); isAppArmor {
			got = append(got, profile)
		}
	}

	if wanted := slices.DeleteFunc([]string{want}, func(s string) bool { return s == "" }); !slices.Equal(got, wanted) {
		t.Errorf("the engine got the profiles %q, want %q", got, wanted)
	}
}
