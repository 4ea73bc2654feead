package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/registry"
)

const imagePod = `apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    imagePullPolicy: POLICY
    command: [sleep, "100000"]
`

const volumePod = `apiVersion: v1
kind: Pod
metadata: {name: volume, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, "cat /whole/dir/file /part/file; sleep 100000"]
    volumeMounts: [{name: data, mountPath: /whole}, {name: data, mountPath: /part, subPath: dir}]
  volumes: [{name: data, image: {reference: IMAGE, pullPolicy: IfNotPresent}}]
`

// busybox pushes an image with a shell and a unique ID to the registry, and removes it from the
// engine.
func (k *kubelet) busybox(t *testing.T, r *registry.Registry, repository string) string {
	t.Helper()
	ref := r.Host + "/" + repository + ":1"
	script := `set -e
		export DOCKER_HOST=$1 DOCKER_BUILDKIT=0
		printf 'FROM cri-test/busybox:latest\nLABEL repository=%s\n' $2 | docker build -q -t $2 -
		docker push -q $2
		docker rmi $2`
	cmd := k.engine.Command("sh", "-c", script, "sh", "unix://"+k.engine.Socket, ref)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	return ref
}

func (k *kubelet) hasImage(t *testing.T, ref string) bool {
	t.Helper()
	r, err := k.daemon.Image.ImageStatus(t.Context(),
		&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}
	return r.Image != nil
}

// TestKubeletImages tests pull policies, an image volume, and the kubelet's garbage collection,
// which must spare the sandbox image.
func TestKubeletImages(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v, "--pinned-image-labels=team=platform")
			r := registry.Serve(t, k.engine.Listen(t, "127.0.0.1:0"))
			unused, pinned := k.unused(t, r.Add(t, "unused", "1", 1, 1000))
			// The usage of any disk exceeds one per cent.
			k.run(t, strings.Replace(k.config, "imageGCHighThresholdPercent: 100",
				"imageGCHighThresholdPercent: 1\nimageGCLowThresholdPercent: 0\nimageMinimumGCAge: 1s", 1)+
				gate(t, "ImageVolume", 35))
			apply := func(name, image, policy string) {
				t.Helper()
				k.apply(t, name, strings.NewReplacer("NAME", name, "IMAGE", image, "POLICY", policy).Replace(imagePod))
			}

			app := k.busybox(t, r, "app")
			apply("always", app, "Always")
			k.waitRunning(t, "always")
			r.Set("app", registry.Rule{Status: 404, Code: "MANIFEST_UNKNOWN"})
			apply("present", app, "IfNotPresent")
			apply("never", app, "Never")
			apply("again", app, "Always")
			apply("absent", r.Host+"/absent:1", "Never")
			k.waitRunning(t, "present")
			k.waitRunning(t, "never")
			k.waitForReason(t, "again", "ErrImagePull", "ImagePullBackOff")
			k.waitForReason(t, "absent", "ErrImageNeverPull")

			data := r.Put(t, "data", "1", registry.Files(t, map[string]string{"dir/file": "of the image\n"}))
			k.apply(t, "volume", strings.Replace(volumePod, "IMAGE", data, 1))
			k.waitRunning(t, "volume")
			eventually(t, "the image's file is read", func() error {
				text, err := k.get("/containerLogs/default/volume-node/main")
				if err == nil && text != "of the image\nof the image\n" {
					err = fmt.Errorf("%q", text)
				}
				return err
			})

			within(t, gcPeriod+time.Minute, "an unused image is collected", func() error {
				if k.hasImage(t, unused) {
					return errors.New("the image exists")
				}
				return nil
			})

			for _, i := range append(pinned, app) {
				if !k.hasImage(t, i) {
					t.Errorf("the pinned or used image %s was collected", i)
				}
			}
		})
	}
}

// waitForReason waits until a pod's container is waiting for one of these reasons.
func (k *kubelet) waitForReason(t *testing.T, name string, reasons ...string) {
	t.Helper()
	eventually(t, name+" is waiting", func() error {
		c := k.pod(t, name).container("main")
		for _, r := range reasons {
			if c.State.Waiting != nil && c.State.Waiting.Reason == r {
				return nil
			}
		}
		return fmt.Errorf("%+v", c)
	})
}

// unused adds unused images without the kubelet. It returns the ID of a pulled image, and the IDs
// of the pinned ones: the sandbox image, and an image with the label of --pinned-image-labels.
func (k *kubelet) unused(t *testing.T, ref string) (image string, pinned []string) {
	t.Helper()
	const build = "printf 'FROM scratch\nLABEL team=platform\nCMD /none\n' | DOCKER_BUILDKIT=0 docker -H $1 build " +
		"-t built/pinned:1 -"
	if out, err := k.engine.Command("sh", "-c", build, "sh", "unix://"+k.engine.Socket).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	p, err := k.daemon.Image.PullImage(t.Context(),
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}

	pod, err := k.daemon.Runtime.RunPodSandbox(t.Context(),
		&runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{
				Name:      "first",
				Namespace: "default",
				Uid:       "first",
			}, Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: k.engine.CgroupParent},
		}})
	if err != nil {
		t.Fatal(err)
	}

	if _, err := k.daemon.Runtime.RemovePodSandbox(t.Context(),
		&runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
		t.Fatal(err)
	}

	l, err := k.daemon.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, i := range l.Images {
		if i.Pinned {
			pinned = append(pinned, i.Id)
		}
	}

	if len(pinned) != 2 {
		t.Errorf("pinned: %v", pinned)
	}

	return p.ImageRef, pinned
}

// gcPeriod is the interval of the kubelet's garbage collection. It collects only images seen in the
// previous run.
const gcPeriod = 5 * time.Minute

// secretPod returns a pod with a private image and secrets for its registry.
func secretPod(name, image string, secrets ...object) object {
	return object{
		"kind":       "Pod",
		"apiVersion": "v1",
		"metadata": object{
			"name":            name,
			"namespace":       "default",
			"uid":             "uid-" + name,
			"resourceVersion": "1",
		},
		"spec": object{
			"nodeName":                      "node",
			"automountServiceAccountToken":  false,
			"enableServiceLinks":            false,
			"securityContext":               object{},
			"terminationGracePeriodSeconds": 1,
			"imagePullSecrets":              secrets,
			"restartPolicy":                 "Always",
			"dnsPolicy":                     "Default",
			"containers": []object{{
				"name":            "main",
				"image":           image,
				"imagePullPolicy": "IfNotPresent",
				"command":         []string{"sleep", "100000"},
			}},
		},
		"status": object{"phase": "Pending"},
	}
}

// secretObjects returns a node, a secret for a registry, and three pods with a private image. The
// pod stranger has no secret.
func secretObjects(host, image string) map[string][]object {
	resources := object{"pods": "10", "cpu": "2", "memory": "8Gi", "ephemeral-storage": "10Gi"}
	config := `{"auths":{"` + host + `":{"username":"user","password":"secret"}}}`
	login := object{"name": "login"}

	return map[string][]object{
		"/api/v1/nodes": {{
			"kind":       "Node",
			"apiVersion": "v1",
			"metadata":   object{"name": "node", "resourceVersion": "1"},
			"status": object{
				"conditions":  []object{{"type": "Ready", "status": "True"}},
				"capacity":    resources,
				"allocatable": resources,
			},
		}},
		"/api/v1/namespaces/default/pods": {
			secretPod("first", image, login),
			secretPod("second", image, login),
			secretPod("stranger", image),
		},
		"/api/v1/namespaces/default/secrets": {{
			"kind":       "Secret",
			"apiVersion": "v1",
			"metadata":   object{"name": "login", "namespace": "default", "resourceVersion": "1"},
			"type":       "kubernetes.io/dockerconfigjson",
			"data":       object{".dockerconfigjson": base64.StdEncoding.EncodeToString([]byte(config))},
		}},
	}
}

// TestKubeletPullSecret pulls an image with the secret of a registry. A second pod with the secret
// uses the pulled image. A pod without the secret must not get the image
// (KubeletEnsureSecretPulledImages).
func TestKubeletPullSecret(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			k := prepare(t, v)
			r := registry.Serve(t, k.engine.Listen(t, "127.0.0.1:0"))
			private := k.busybox(t, r, "private")
			r.Set("", registry.Rule{User: "user", Password: "secret"})
			api, kubeconfig := k.serveAPI(t, secretObjects(r.Host, private))
			k.run(t, k.config+"contentType: application/json\nconfigMapAndSecretChangeDetectionStrategy: Get\n"+
				"imagePullCredentialsVerificationPolicy: AlwaysVerify\n"+
				gate(t, "KubeletEnsureSecretPulledImages", 35), kubeconfig)
			runs := func(pod string) error {
				l, err := k.daemon.Runtime.ListContainers(t.Context(),
					&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
						LabelSelector: map[string]string{"io.kubernetes.pod.name": pod},
						State: &runtimeapi.ContainerStateValue{
							State: runtimeapi.ContainerState_CONTAINER_RUNNING,
						},
					}})
				if err == nil && len(l.Containers) != 1 {
					err = fmt.Errorf("containers of %s: %v", pod, l.Containers)
				}

				return err
			}

			for _, name := range []string{"first", "second"} {
				eventually(t, name+" runs", func() error { return runs(name) })
			}

			if !k.hasImage(t, private) {
				t.Error("the image is missing")
			}

			eventually(t, "the pod without the secret is refused", func() error {
				if !api.hasEvent("stranger", "Failed to pull image") {
					return errors.New("no event")
				}
				return nil
			})

			if runs("stranger") == nil {
				t.Error("a pod without the secret runs the private image")
			}
		})
	}
}
