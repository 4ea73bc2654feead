package main

import (
	"context"
	"fmt"
	"os"
	"time"

	cadvisorapi "github.com/google/cadvisor/lib/model"
	"go.opentelemetry.io/otel/trace/noop"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/component-base/metrics"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/kuberuntime"
	kubeutil "k8s.io/kubernetes/pkg/kubelet/kuberuntime/util"
	"k8s.io/kubernetes/pkg/kubelet/logs"
	"k8s.io/kubernetes/pkg/kubelet/metrics/collectors"
	serverstats "k8s.io/kubernetes/pkg/kubelet/server/stats"
	"k8s.io/kubernetes/pkg/kubelet/stats"
)

// kubelet has the parts of a kubelet with access to the runtime.
type kubelet struct {
	dir     string
	runtime kuberuntime.KubeGenericRuntime
	// with stats from the CRI only (PodAndContainerStatsFromCRI), and combined with cAdvisor
	providers  []*stats.Provider
	collectors []metrics.StableCollector
}

func newKubelet(
	ctx context.Context, runtime internalapi.RuntimeService, images internalapi.ImageManagerService,
) (*kubelet, error) {
	dir, err := os.MkdirTemp("", "kubeletread-")
	if err != nil {
		return nil, err
	}

	k := &kubelet{dir: dir}
	k.runtime, _, err = kuberuntime.NewKubeGenericRuntimeManager(
		ctx, record.NewFakeRecorder(0), nil, nil, nil, dir, dir, &cadvisorapi.MachineInfo{}, states{}, 110,
		kubecontainer.RealOS{}, nil, nil, flowcontrol.NewBackOff(time.Second, time.Second), false, nil, 0, 0,
		string(kubeletconfig.NeverVerify), nil, "", "", nil, false, metav1.Duration{}, nil, runtime, images,
		cm.NewFakeContainerManager(klog.Background()), logs.NewStubContainerLogManager(), nil, false, "",
		func() v1.ResourceList { return nil }, nil, kubeletconfig.NoneMemoryReservationPolicy, nil,
		noop.NewTracerProvider(), nil, nil, nil)
	if err != nil {
		k.close()
		return nil, err
	}

	host := stats.NewHostStatsProvider(kubecontainer.RealOS{}, func(types.UID) string { return "" }, dir)
	for _, fromCRI := range []bool{true, false} {
		k.providers = append(k.providers, stats.NewCRIStatsProvider(noCadvisor{}, noVolumes{}, nil, runtime, images,
			host, fromCRI, false, noFallback{}))
	}

	k.collectors = []metrics.StableCollector{
		collectors.NewCRIMetricsCollector(ctx, k.runtime.ListPodSandboxMetrics, k.runtime.ListMetricDescriptors),
		collectors.NewLogMetricsCollector(k.providers[0].ListPodStats),
		collectors.NewResourceMetricsCollector(summaries{k.providers[0]}),
	}

	for _, c := range k.collectors { // separate registries, because some names are the same
		metrics.NewKubeRegistry().CustomMustRegister(c)
	}

	return k, nil
}

func (k *kubelet) close() { _ = os.RemoveAll(k.dir) }

// read reads everything once. It returns the number of pods and the errors a kubelet would log.
func (k *kubelet) read(ctx context.Context) (pods int, errs []error) {
	add := func(operation string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", operation, err))
		}
	}

	_, err := k.runtime.Status(ctx)
	add("status", err)
	_, err = k.runtime.ListImages(ctx)
	add("images", err)
	_, err = k.runtime.ImageStats(ctx)
	add("stats of images", err)
	k.collect()
	for _, p := range k.providers {
		_, err = p.ListPodStats(ctx)
		add("stats of pods", err)
		_, err = p.ListPodStatsAndUpdateCPUNanoCoreUsage(ctx)
		add("stats of pods with cores", err)
		_, err = p.ListPodCPUAndMemoryStats(ctx)
		add("CPU and memory of pods", err)
		_, _, err = p.ImageFsStats(ctx)
		add("image file system", err)
		_, err = p.ImageFsDevice(ctx)
		add("image file system's device", err)
	}

	all, err := k.runtime.GetPods(ctx, true)
	add("pods", err)
	for _, pod := range all {
		add("pod", k.readPod(ctx, pod))
	}

	return len(all), errs
}

// collect runs the collectors in this goroutine, where panics can be recovered.
func (k *kubelet) collect() {
	published := make(chan metrics.Metric)
	defer close(published)

	go func() {
		for range published { //nolint:revive // discards the metrics
		}
	}()

	for _, c := range k.collectors {
		c.CollectWithStability(published)
	}
}

// readPod reads the state of a pod like a pod worker.
func (k *kubelet) readPod(ctx context.Context, pod *kubecontainer.Pod) error {
	status, err := k.runtime.GetPodStatus(ctx, pod)
	if err != nil {
		return err
	}

	desired := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: pod.ID, Name: pod.Name, Namespace: pod.Namespace}}
	kubeutil.PodSandboxChanged(desired, status)
	kubecontainer.ConvertPodStatusToRunningPod(k.runtime.Type(), status)
	for _, c := range pod.Containers {
		if _, err := k.runtime.GetContainerStatus(ctx, pod.ID, c.ID); err != nil {
			return err
		}
	}

	for _, p := range k.providers {
		if _, err := p.PodCPUAndMemoryStats(ctx, desired, status); err != nil {
			return err
		}
	}

	return nil
}

// event handles an event like the evented PLEG, which drops events without a pod.
func (k *kubelet) event(e *runtimeapi.ContainerEventResponse) {
	if e.PodSandboxStatus != nil && e.PodSandboxStatus.Metadata != nil {
		k.runtime.GeneratePodStatus(e)
	}
}

// noCadvisor is a cAdvisor with file systems but without containers.
type noCadvisor struct{ cadvisor.Interface }

var disk = cadvisorapi.FsInfo{Timestamp: time.Unix(1, 0), Device: "/dev/sda1", Capacity: 1 << 30, Available: 1 << 29}

func (noCadvisor) RootFsInfo() (cadvisorapi.FsInfo, error)         { return disk, nil }
func (noCadvisor) GetDirFsInfo(string) (cadvisorapi.FsInfo, error) { return disk, nil }

func (noCadvisor) ContainerInfoV2(
	string, cadvisorapi.RequestOptions,
) (map[string]cadvisorapi.ContainerInfo, error) {
	return nil, nil
}

// noVolumes is a resource analyzer for pods without volumes.
type noVolumes struct{ serverstats.ResourceAnalyzer }

func (noVolumes) GetPodVolumeStats(types.UID) (serverstats.PodVolumeStats, bool) {
	return serverstats.PodVolumeStats{}, false
}

// noFallback is a provider without stats.
type noFallback struct{ *stats.Provider }

func (noFallback) PodCPUAndMemoryStats(context.Context, *v1.Pod, *kubecontainer.PodStatus) (*statsapi.PodStats, error) {
	return &statsapi.PodStats{}, nil
}

// summaries provides summaries with pods only.
type summaries struct{ *stats.Provider }

func (s summaries) Get(ctx context.Context, _ bool) (*statsapi.Summary, error) {
	pods, err := s.ListPodStats(ctx)
	return &statsapi.Summary{Pods: pods}, err
}

func (s summaries) GetCPUAndMemoryStats(ctx context.Context) (*statsapi.Summary, error) {
	pods, err := s.ListPodCPUAndMemoryStats(ctx)
	return &statsapi.Summary{Pods: pods}, err
}

// states reports that no pod is being terminated or removed.
type states struct{}

func (states) IsPodTerminationRequested(types.UID) bool { return false }
func (states) ShouldPodContentBeRemoved(types.UID) bool { return false }
func (states) ShouldPodRuntimeBeRemoved(types.UID) bool { return false }
