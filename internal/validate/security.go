package validate

import (
	"fmt"
	"math"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// securityContext holds the common fields of the security contexts of sandboxes and containers.
type securityContext struct {
	user, group *runtimeapi.Int64Value
	username    string
	policy      runtimeapi.SupplementalGroupsPolicy
	groups      []int64
}

// user checks the user and groups of a process. Docker has no group without a user
// (Config.User, "user[:group]").
func (p *problems) user(field string, sc securityContext) {
	if sc.group != nil && sc.user == nil && sc.username == "" {
		p.add(field+".run_as_group", "needs run_as_user or run_as_username")
	}
	if sc.policy == runtimeapi.SupplementalGroupsPolicy_Strict {
		for i, id := range sc.groups {
			if id < 0 || id > math.MaxUint32 {
				p.add(fmt.Sprintf("%s.supplemental_groups[%d]", field, i), "%d is not a group", id)
			}
		}
	}
}

// strictGroups rejects the policy Strict for a process of Docker's own runtime.
func (p *problems) strictGroups(policy runtimeapi.SupplementalGroupsPolicy, usesShim bool) {
	if policy == runtimeapi.SupplementalGroupsPolicy_Strict && !usesShim {
		p.add(securityField+".supplemental_groups_policy", "Strict is not supported on this runtime; use Merge")
	}
}

// ambient rejects ambient capabilities for a process of Docker's own runtime.
func (p *problems) ambient(c *runtimeapi.Capability, usesShim bool) {
	if len(c.GetAddAmbientCapabilities()) > 0 && !usesShim {
		p.add(securityField+".capabilities.add_ambient_capabilities", "Docker cannot set ambient capabilities")
	}
}

func (p *problems) namespaces(field string, o *runtimeapi.NamespaceOption) {
	enum(p, field+".network", runtimeapi.NamespaceMode_name, o.GetNetwork())
	enum(p, field+".pid", runtimeapi.NamespaceMode_name, o.GetPid())
	enum(p, field+".ipc", runtimeapi.NamespaceMode_name, o.GetIpc())
	if o.GetPid() == runtimeapi.NamespaceMode_TARGET {
		p.id(field+".target_id", o.GetTargetId())
	}

	p.podOrNode(field+".network", o.GetNetwork())
	p.podOrNode(field+".ipc", o.GetIpc())
	p.userns(field, o)
}

// podOrNode requires the mode of a namespace shared by all containers of a pod (CRI
// NamespaceOption: network and ipc are POD or NODE).
func (p *problems) podOrNode(field string, m runtimeapi.NamespaceMode) {
	if m == runtimeapi.NamespaceMode_CONTAINER || m == runtimeapi.NamespaceMode_TARGET {
		p.add(field, "%v is not allowed, it must be POD or NODE", m)
	}
}

func (p *problems) profile(field string, s *runtimeapi.SecurityProfile) {
	enum(p, field+".profile_type", runtimeapi.SecurityProfile_ProfileType_name, s.GetProfileType())
	if s.GetProfileType() == runtimeapi.SecurityProfile_Localhost {
		p.required(field+".localhost_ref", model.LocalhostRef(s))
	}
}

// appArmorName checks the name of a Localhost profile. Docker takes "unconfined" for no profile at
// all, and policies that forbid the type Unconfined permit Localhost (Pod Security Standards,
// Baseline).
func (p *problems) appArmorName(field string, s *runtimeapi.SecurityProfile) {
	ref := model.LocalhostRef(s)
	p.text(field, ref)
	if ref == "unconfined" {
		p.add(field, "%q is not the name of a profile; set profile_type to Unconfined", ref)
	}
}

// profileString checks the string form of a profile.
func (p *problems) profileString(field, s string) {
	profile, err := model.ParseProfile(s)
	if err != nil {
		p.wrap(field, err)
		return
	}

	if profile.GetProfileType() == runtimeapi.SecurityProfile_Localhost {
		p.required(field, model.LocalhostRef(profile))
	}
}
