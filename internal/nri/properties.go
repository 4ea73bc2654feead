package nri

import (
	"github.com/containerd/nri/pkg/api"
)

// property is a part of an adjustment or an update. fields are NRI's names of it, by which the
// plugin is known.
type property[T any] struct {
	name   string
	isSet  func(T) bool
	fields []api.Field
}

// propertiesOf returns the properties that are set.
func propertiesOf[T any](all []property[T], in T) (out []property[T]) {
	for _, p := range all {
		if p.isSet(in) {
			out = append(out, p)
		}
	}
	return out
}

// shimProperties are the adjustments that only the containerd shim can carry out, besides
// resources.
var shimProperties = []property[*api.ContainerAdjustment]{
	{
		name:   "CDI devices",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetCDIDevices()) > 0 },
		fields: []api.Field{api.Field_CdiDevices},
	},
	{
		name:   "I/O priority",
		isSet:  func(a *api.ContainerAdjustment) bool { return a.GetLinux().GetIoPriority() != nil },
		fields: []api.Field{api.Field_IoPriority},
	},
	{
		name: "RDT",
		isSet: func(a *api.ContainerAdjustment) bool {
			return a.GetLinux().GetRdt() != nil
		},
		fields: []api.Field{api.Field_RdtClosID, api.Field_RdtSchemata, api.Field_RdtEnableMonitoring},
	},
	{
		name:   "annotations",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetAnnotations()) > 0 },
		fields: []api.Field{api.Field_Annotations},
	},
	{
		name:   "arguments",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetArgs()) > 0 },
		fields: []api.Field{api.Field_Args},
	},
	{
		name:   "control group",
		isSet:  func(a *api.ContainerAdjustment) bool { return a.GetLinux().GetCgroupsPath() != "" },
		fields: []api.Field{api.Field_CgroupsPath},
	},
	{
		name:   "devices",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetLinux().GetDevices()) > 0 },
		fields: []api.Field{api.Field_Devices},
	},
	{
		name:   "environment",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetEnv()) > 0 },
		fields: []api.Field{api.Field_Env},
	},
	{
		name:   "hooks",
		isSet:  func(a *api.ContainerAdjustment) bool { return a.GetHooks() != nil },
		fields: []api.Field{api.Field_OciHooks},
	},
	{
		name:   "memory policy",
		isSet:  func(a *api.ContainerAdjustment) bool { return a.GetLinux().GetMemoryPolicy() != nil },
		fields: []api.Field{api.Field_MemoryPolicy},
	},
	{
		name:   "mounts",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetMounts()) > 0 },
		fields: []api.Field{api.Field_Mounts},
	},
	{
		name:   "namespaces",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetLinux().GetNamespaces()) > 0 },
		fields: []api.Field{api.Field_Namespace},
	},
	{
		name:   "network devices",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetLinux().GetNetDevices()) > 0 },
		fields: []api.Field{api.Field_LinuxNetDevices},
	},
	{
		name:   "process limits",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetRlimits()) > 0 },
		fields: []api.Field{api.Field_Rlimits},
	},
	{
		name:   "scheduler",
		isSet:  func(a *api.ContainerAdjustment) bool { return a.GetLinux().GetScheduler() != nil },
		fields: []api.Field{api.Field_LinuxSched},
	},
	{
		name:   "seccomp policy",
		isSet:  func(a *api.ContainerAdjustment) bool { return a.GetLinux().GetSeccompPolicy() != nil },
		fields: []api.Field{api.Field_SeccompPolicy},
	},
	{
		name:   "sysctls",
		isSet:  func(a *api.ContainerAdjustment) bool { return len(a.GetLinux().GetSysctl()) > 0 },
		fields: []api.Field{api.Field_Sysctl},
	},
}

// otherResources are the resources that neither the CRI nor model.PluginResources has.
var otherResources = []property[*api.LinuxResources]{
	{
		name:   "OOM killer",
		isSet:  func(r *api.LinuxResources) bool { return r.GetMemory().GetDisableOomKiller().GetValue() },
		fields: []api.Field{api.Field_MemDisableOomKiller},
	},
	{
		name:   "RDT class",
		isSet:  func(r *api.LinuxResources) bool { return r.GetRdtClass() != nil },
		fields: []api.Field{api.Field_RdtClass},
	},
	{
		name:   "block I/O class",
		isSet:  func(r *api.LinuxResources) bool { return r.GetBlockioClass() != nil },
		fields: []api.Field{api.Field_BlockioClass},
	},
	{
		name:   "hierarchical accounting",
		isSet:  func(r *api.LinuxResources) bool { return r.GetMemory().GetUseHierarchy() != nil },
		fields: []api.Field{api.Field_MemUseHierarchy},
	},
	{
		name:   "kernel TCP memory",
		isSet:  func(r *api.LinuxResources) bool { return r.GetMemory().GetKernelTcp() != nil },
		fields: []api.Field{api.Field_MemTCPLimit},
	},
	{
		name:   "kernel memory",
		isSet:  func(r *api.LinuxResources) bool { return r.GetMemory().GetKernel() != nil },
		fields: []api.Field{api.Field_MemKernelLimit},
	},
	{
		name: "realtime CPU time",
		isSet: func(r *api.LinuxResources) bool {
			return r.GetCpu().GetRealtimeRuntime() != nil || r.GetCpu().GetRealtimePeriod() != nil
		},
		fields: []api.Field{api.Field_CPURealtimeRuntime, api.Field_CPURealtimePeriod},
	},
	{
		name:   "rules for device nodes",
		isSet:  func(r *api.LinuxResources) bool { return len(r.GetDevices()) > 0 },
		fields: []api.Field{api.Field_Devices},
	},
	{
		name:   "swappiness",
		isSet:  func(r *api.LinuxResources) bool { return r.GetMemory().GetSwappiness() != nil },
		fields: []api.Field{api.Field_MemSwappiness},
	},
}

// resourceFields are the fields of the resources that Docker's API can express.
var resourceFields = []api.Field{
	api.Field_MemLimit, api.Field_MemSwapLimit, api.Field_CPUShares, api.Field_CPUQuota, api.Field_CPUPeriod,
	api.Field_CPUSetCPUs, api.Field_CPUSetMems, api.Field_HugepageLimits, api.Field_CgroupsUnified,
	api.Field_OomScoreAdj, api.Field_MemReservation, api.Field_PidsLimit,
}
