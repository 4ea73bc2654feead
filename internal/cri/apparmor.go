package cri

import (
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// AppArmor knows the profiles in the kernel; see package apparmor.
type AppArmor interface {
	// IsLoaded reports whether a profile is loaded. It fails if the kernel does not list its
	// profiles to this process.
	IsLoaded(profile string) (bool, error)
}

// engineAppArmor is the profile that Docker loads by itself before it starts a container.
const engineAppArmor = "docker-default"

// checkAppArmor refuses a Localhost profile that is not loaded: Docker would report it only when
// the container starts, as a failure of the OCI runtime. field is its field in the security
// context. If the profiles cannot be listed, the engine decides.
func (d *Deps) checkAppArmor(field string, p *runtimeapi.SecurityProfile, host model.Host) error {
	ref := model.LocalhostRef(p)
	if ref == "" || ref == engineAppArmor || !host.Has("apparmor") {
		return nil
	}

	isLoaded, err := d.AppArmor.IsLoaded(ref)
	if err != nil {
		d.Log.Debug("cannot check an AppArmor profile; the engine decides", "profile", ref, "err", err)
		return nil
	}

	if !isLoaded {
		return fmt.Errorf("config.linux.security_context.%s: AppArmor profile %q is not loaded on this node; load it "+
			"(apparmor_parser --replace /etc/apparmor.d/FILE) or select a node that has it: %w", field, ref,
			errdefs.ErrInvalidArgument)
	}

	return nil
}
